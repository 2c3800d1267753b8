// A little Markdown as document nodes: code blocks, headings, lists, tables, bold, italic, code. What it does not know stays text.

import { element } from "./dom.js";

const INLINE = /(`+)([^`]+?)\1|\*\*(?=\S)(.+?)(?<=\S)\*\*|(?<![\w*])\*(?=[^\s*])([^*]+?)(?<=\S)\*(?![\w*])/g;
const ITEM = /^(\s*)(?:([-*+])|(\d{1,9})[.)])\s+(.*)$/;
const FENCE = /^\s*(```+(?=[^`]*$)|~~~+)\s*([\w+#.-]*)/;
const ROW = /^\s*\|.*\|\s*$/, RULE = /^\s*\|(?:\s*:?-+:?\s*\|)+\s*$/;

/** Nodes for a text that a model wrote. */
export function render(text) {
  const lines = text.replace(/\r\n?/g, "\n").split("\n");
  const nodes = [];
  let at = 0;
  while (at < lines.length) {
    const fence = lines[at].match(FENCE);
    if (fence) at = code(lines, at, fence, nodes);
    else if (/^#{1,6}\s/.test(lines[at])) nodes.push(element("h3", { dir: "auto" }, ...inline(lines[at++].replace(/^#+\s+/, ""))));
    else if (ITEM.test(lines[at])) at = list(lines, at, nodes);
    else if (ROW.test(lines[at]) && RULE.test(lines[at + 1] ?? "")) at = table(lines, at, nodes);
    else if (!lines[at].trim()) at++;
    else at = paragraph(lines, at, nodes);
  }
  return nodes;
}

function code(lines, at, [, mark, name], nodes) {
  const body = [];
  for (at++; at < lines.length && !lines[at].trim().startsWith(mark); at++) body.push(lines[at]);
  nodes.push(element("pre", { tabindex: "0", "data-language": name || null }, element("code", {}, body.join("\n"))));
  return at + 1;
}

function list(lines, at, nodes) {
  const [, indent, , number] = lines[at].match(ITEM);
  const items = element(number ? "ol" : "ul", number && number !== "1" ? { start: number } : {});
  while (at < lines.length) {
    const item = lines[at].match(ITEM);
    const deeper = items.lastChild && /^\s/.test(lines[at]) && lines[at].search(/\S/) > indent.length;
    if (item && item[1].length > indent.length && items.lastChild) {
      const inner = [];
      at = list(lines, at, inner);
      items.lastChild.append(...inner);
    } else if (item && item[1].length >= indent.length && Boolean(item[3]) === Boolean(number)) {
      items.append(element("li", {}, ...inline(item[4])));
      at++;
    } else if (!item && deeper) {
      items.lastChild.append(" ", ...inline(lines[at++].trim()));
    } else if (!lines[at].trim() && ITEM.test(lines[at + 1] ?? "")) at++;
    else break;
  }
  items.dir = "auto";
  nodes.push(items);
  return at;
}

function table(lines, at, nodes) {
  const row = (line, tag) =>
    element("tr", {}, ...line.trim().slice(1, -1).split("|").map((cell) => element(tag, { dir: "auto" }, ...inline(cell.trim()))));
  const body = element("tbody"), head = element("thead", {}, row(lines[at], "th"));
  for (at += 2; at < lines.length && ROW.test(lines[at]); at++) body.append(row(lines[at], "td"));
  nodes.push(element("table", {}, head, body));
  return at;
}

function paragraph(lines, at, nodes) {
  const node = element("p");
  const ends = (line) => !line.trim() || ITEM.test(line) || /^#{1,6}\s/.test(line) || FENCE.test(line) || ROW.test(line);
  do {
    if (node.firstChild) node.append(element("br"));
    node.append(...inline(lines[at++]));
  } while (at < lines.length && !ends(lines[at]));
  node.dir = "auto";
  nodes.push(node);
  return at;
}

function inline(text) {
  const nodes = [];
  let last = 0;
  for (const found of text.matchAll(INLINE)) {
    nodes.push(text.slice(last, found.index));
    if (found[2] !== undefined) nodes.push(element("code", {}, found[2]));
    else if (found[3] !== undefined) nodes.push(element("strong", {}, ...inline(found[3])));
    else nodes.push(element("em", {}, ...inline(found[4])));
    last = found.index + found[0].length;
  }
  nodes.push(text.slice(last));
  return nodes;
}
