// Markdown as models write it, parsed into plain values: blocks here, inline text in inline.js.
// No HTML exists in this dialect: tags are text. Every pass is linear in the length of the text.

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:\s+(.*))?$/;
const QUOTE = /^ {0,3}> ?(.*)$/;
const ITEM = /^(\s*)([-*+•]|\d{1,9}[.)、])(?:\s+(.*)|)$/;
const TASK = /^\[([ xX])\]\s+(.*)$/s;
const CELL = /^:?-+:?$/;
const DEEPEST = 8; // quotes and lists inside each other; what is deeper stays text

/**
 * Top-level blocks of a text, in order. Each has `type` and `raw` (its source lines), and by type:
 * heading {level, text}, paragraph {text}, code {language, text}, rule, quote {blocks},
 * list {ordered, start, items: [{checked, blocks}]}, table {head, aligns, rows}.
 */
export function parseBlocks(text, depth = 0) {
  const lines = text.replace(/\r\n?/g, "\n").replaceAll("\t", "    ").split("\n");
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) {
      at += 1;
      continue;
    }
    const [block, next] = readBlock(lines, at, depth);
    block.raw = lines.slice(at, next).join("\n");
    blocks.push(block);
    at = next;
  }
  return blocks;
}

function readBlock(lines, at, depth) {
  const line = lines[at];
  const fence = FENCE.exec(line);
  if (fence) return readCode(lines, at, fence);
  const heading = HEADING.exec(line);
  if (heading) {
    const text = (heading[2] ?? "").replace(/\s#+$/, "").trim();
    return [{ type: "heading", level: heading[1].length, text }, at + 1];
  }
  if (isRule(line)) return [{ type: "rule" }, at + 1];
  if (depth < DEEPEST && QUOTE.test(line)) return readQuote(lines, at, depth);
  if (depth < DEEPEST && ITEM.test(line)) return readList(lines, at, depth);
  if (isTable(lines, at)) return readTable(lines, at);
  return readParagraph(lines, at, depth);
}

function readCode(lines, at, [opening, marks, info]) {
  const indent = opening.length - opening.trimStart().length;
  const body = [];
  for (let next = at + 1; next < lines.length; next += 1) {
    const line = lines[next].trim();
    if (line.startsWith(marks) && line === marks[0].repeat(line.length)) return [code(info, body), next + 1];
    body.push(cutIndent(lines[next], indent));
  }
  return [code(info, body), lines.length]; // still being written
}

const code = (info, body) => ({ type: "code", language: info.trim().split(/\s/, 1)[0], text: body.join("\n") });

function isRule(line) {
  const marks = line.replaceAll(" ", "");
  return marks.length >= 3 && ["-", "*", "_"].includes(marks[0]) && marks === marks[0].repeat(marks.length);
}

function readQuote(lines, at, depth) {
  const inner = [];
  let next = at;
  for (; next < lines.length; next += 1) {
    const quoted = QUOTE.exec(lines[next]);
    if (!quoted && (!lines[next].trim() || startsBlock(lines, next, depth))) break;
    inner.push(quoted ? quoted[1] : lines[next]);
  }
  return [{ type: "quote", blocks: parseBlocks(inner.join("\n"), depth + 1) }, next];
}

function readList(lines, at, depth) {
  const [, indentText, marker] = ITEM.exec(lines[at]);
  const indent = indentText.length;
  const kind = kindOf(marker);
  const items = [];
  let next = at;
  while (next < lines.length) {
    const item = ITEM.exec(lines[next]);
    if (!item || isRule(lines[next]) || kindOf(item[2]) !== kind || item[1].length < indent || item[1].length > indent + 1) break;
    const [body, end] = readItem(lines, next, item);
    items.push(listItem(body, depth));
    next = end;
  }
  const ordered = kind !== "bullet";
  return [{ type: "list", ordered, start: ordered ? parseInt(marker, 10) : 1, items }, next];
}

const kindOf = (marker) => (/\d/.test(marker) ? `number ${marker.at(-1)}` : "bullet");

// Lines of one item: what is indented below its marker, and plain lines that just go on.
function readItem(lines, at, item) {
  const body = [item[3] ?? ""];
  const inside = item[1].length + 2;
  let next = at + 1;
  let blank = 0;
  for (; next < lines.length; next += 1) {
    const line = lines[next];
    if (!line.trim()) {
      blank += 1;
      continue;
    }
    const indent = line.length - line.trimStart().length;
    if (indent < inside && (blank || startsBlock(lines, next, 0) || ITEM.test(line))) break;
    body.push(...Array(blank).fill(""), cutIndent(line, item[1].length + item[2].length + 1));
    blank = 0;
  }
  // Empty lines between two items belong to the list, those behind it do not matter.
  return [body.join("\n"), next];
}

function listItem(body, depth) {
  const task = TASK.exec(body);
  const checked = task ? task[1] !== " " : null;
  return { checked, blocks: parseBlocks(task ? task[2] : body, depth + 1) };
}

function cutIndent(line, most) {
  const indent = line.length - line.trimStart().length;
  return line.slice(Math.min(indent, most));
}

function isTable(lines, at) {
  if (at + 1 >= lines.length || !lines[at].includes("|") || !lines[at + 1].includes("-")) return false;
  const marks = cells(lines[at + 1]);
  return marks.length === cells(lines[at]).length && marks.every((mark) => CELL.test(mark));
}

function readTable(lines, at) {
  const head = cells(lines[at]);
  const aligns = cells(lines[at + 1]).map(alignOf);
  const rows = [];
  let next = at + 2;
  for (; next < lines.length && lines[next].includes("|"); next += 1) {
    const row = cells(lines[next]);
    rows.push(head.map((_, column) => row[column] ?? ""));
  }
  return [{ type: "table", head, aligns, rows }, next];
}

const alignOf = (mark) => (mark.endsWith(":") ? (mark.startsWith(":") ? "center" : "end") : "start");

function cells(line) {
  const inner = line.trim().replace(/^\|/, "").replace(/\|$/, "");
  return inner.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function readParagraph(lines, at, depth) {
  let next = at + 1;
  while (next < lines.length && lines[next].trim() && !startsBlock(lines, next, depth)) next += 1;
  return [{ type: "paragraph", text: lines.slice(at, next).map((line) => line.trim()).join("\n") }, next];
}

// Whether a line ends the paragraph before it. A number other than 1 may be a year at the start of a line.
function startsBlock(lines, at, depth) {
  const line = lines[at];
  if (FENCE.test(line) || HEADING.test(line) || isRule(line) || isTable(lines, at)) return true;
  if (depth >= DEEPEST) return false;
  const item = ITEM.exec(line);
  return QUOTE.test(line) || (item !== null && Boolean(item[3]) && (kindOf(item[2]) === "bullet" || parseInt(item[2], 10) === 1));
}
