// What the browser keeps for this page. Where its storage is full or forbidden, nothing is kept and the page goes on.

/** What was kept under a name; null: nothing. `storage`: "localStorage" or "sessionStorage". */
export function recall(storage, name) {
  try {
    return window[storage].getItem(`millis-${name}`);
  } catch {
    return null;
  }
}

/** Keeps a text under a name, if it can. */
export function keep(storage, name, value) {
  try {
    window[storage].setItem(`millis-${name}`, value);
  } catch {
    return;
  }
}
