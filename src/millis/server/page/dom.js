// Making elements. Text goes in as text and never as markup.

const SVG = "http://www.w3.org/2000/svg";

/** An HTML element with attributes and children; a child that is a string becomes text. */
export function element(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** The same for SVG. */
export function shape(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(node, attributes, children) {
  node.append(...children); // before dir="auto", which would look through the text again with each
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== false && value != null) node.setAttribute(name, value === true ? "" : value);
  }
  return node;
}
