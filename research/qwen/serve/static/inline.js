// Inline markdown, parsed into plain values: text, break, code, strong, em, del and link.
// Only links to http and https exist; everything else in brackets stays text.

const ESCAPABLE = /[!-/:-@[-`{-~]/;
const ADDRESS = /https?:\/\/[^\s<>"'`，。；：！？、（）【】《》“”‘’]+/iy;
const MARKERS = ["***", "**", "__", "~~", "*", "_"];
const DEEPEST = 8;
const LONGEST_TARGET = 2500; // of a link
// (address "title"); the address may hold one level of brackets.
const TARGET = /^\(\s*<?((?:[^\s<>()]|\([^\s<>()]*\))*)>?(?:\s+(?:"[^"\n]*"|'[^'\n]*'))?\s*\)/;
const WORD = /[\p{L}\p{N}_]/u;

/** The pieces of a text: {type, text}, {type, children} or {type: "link", href, children}. */
export function parseInline(source, depth = 0) {
  const parser = new Inline(source, depth);
  while (parser.at < source.length) parser.step();
  parser.flush();
  return parser.nodes;
}

/** The address as the browser writes it, or null if it is not one of http or https. */
export function safeAddress(text) {
  try {
    const url = new URL(text); // without a base: relative addresses are refused
    return ["http:", "https:"].includes(url.protocol) ? url.href : null;
  } catch {
    return null;
  }
}

class Inline {
  constructor(source, depth) {
    Object.assign(this, { source, depth, at: 0, plain: "", nodes: [], unclosed: new Set() });
  }

  flush() {
    if (this.plain) this.nodes.push({ type: "text", text: this.plain });
    this.plain = "";
  }

  add(node, next) {
    this.flush();
    this.nodes.push(node);
    this.at = next;
  }

  step() {
    const { source, at } = this;
    const sign = source[at];
    if (sign === "\\" && ESCAPABLE.test(source[at + 1] ?? "")) {
      this.plain += source[at + 1];
      this.at += 2;
    } else if (sign === "\n") this.add({ type: "break" }, at + 1);
    else if (!this.special(sign)) {
      this.plain += sign;
      this.at += 1;
    }
  }

  special(sign) {
    if (sign === "`") return this.code();
    if (sign === "[" || (sign === "!" && this.source[this.at + 1] === "[")) return this.link();
    if (sign === "<") return this.angleAddress();
    if (sign === "h" || sign === "H") return this.bareAddress();
    if (sign === "*" || sign === "_" || sign === "~") return this.emphasis();
    return false;
  }

  code() {
    const end = this.runEnd(this.at);
    const close = this.closingRun(end, end - this.at);
    if (close < 0) {
      this.plain += this.source.slice(this.at, end);
      this.at = end;
      return true;
    }
    let text = this.source.slice(end, close).replaceAll("\n", " ");
    if (text.startsWith(" ") && text.endsWith(" ") && text.trim()) text = text.slice(1, -1);
    this.add({ type: "code", text }, close + (end - this.at));
    return true;
  }

  runEnd(from) {
    let end = from;
    while (this.source[end] === "`") end += 1;
    return end;
  }

  // Start of the next run of exactly `size` backticks, -1 if there is none (remembered: a search runs once).
  closingRun(from, size) {
    const key = `code ${size}`;
    if (this.unclosed.has(key)) return -1;
    let at = this.source.indexOf("`", from);
    while (at >= 0) {
      const end = this.runEnd(at);
      if (end - at === size) return at;
      at = this.source.indexOf("`", end);
    }
    this.unclosed.add(key);
    return -1;
  }

  // [text](address "title"), and images, which are shown as links: loading one would tell others what is read here.
  link() {
    const { source } = this;
    const open = source[this.at] === "!" ? this.at + 1 : this.at;
    this.pairs ??= bracketPairs(source);
    const close = this.depth < DEEPEST ? this.pairs.get(open) : undefined;
    if (close === undefined || source[close + 1] !== "(") return false;
    const found = TARGET.exec(source.slice(close + 1, close + LONGEST_TARGET));
    const href = found && safeAddress(found[1]);
    if (!href) return false;
    const label = source.slice(open + 1, close);
    const children = label ? parseInline(label, this.depth + 1) : [{ type: "text", text: found[1] }];
    this.add({ type: "link", href, children: withoutLinks(children) }, close + 1 + found[0].length);
    return true;
  }

  angleAddress() {
    const end = this.source.indexOf(">", this.at);
    const href = end > 0 && end - this.at < 2000 ? safeAddress(this.source.slice(this.at + 1, end)) : null;
    if (!href) return false;
    const text = this.source.slice(this.at + 1, end);
    this.add({ type: "link", href, children: [{ type: "text", text }] }, end + 1);
    return true;
  }

  bareAddress() {
    if (/\w/.test(this.source[this.at - 1] ?? " ")) return false; // Chinese puts no space before an address
    ADDRESS.lastIndex = this.at;
    const found = ADDRESS.exec(this.source);
    const text = found ? withoutTail(found[0]) : "";
    const href = text && safeAddress(text);
    if (!href) return false;
    this.add({ type: "link", href, children: [{ type: "text", text }] }, this.at + text.length);
    return true;
  }

  emphasis() {
    const marker = MARKERS.find((candidate) => this.source.startsWith(candidate, this.at) && this.opens(candidate));
    const start = this.at + (marker?.length ?? 0);
    const end = marker && this.depth < DEEPEST ? this.closer(marker, start) : -1;
    if (end < 0) {
      // A run that opens nothing is text as a whole, or its second half would be tried again.
      let after = this.at;
      while (this.source[after] === this.source[this.at]) after += 1;
      this.plain += this.source.slice(this.at, after);
      this.at = after;
      return true;
    }
    const children = parseInline(this.source.slice(start, end), this.depth + 1);
    const inner = marker === "***" ? [{ type: "em", children }] : children;
    const type = marker === "~~" ? "del" : marker.length > 1 ? "strong" : "em";
    this.add({ type, children: inner }, end + marker.length);
    return true;
  }

  opens(marker) {
    const after = this.source[this.at + marker.length] ?? " ";
    if (/\s/.test(after) || after === marker[0] || this.unclosed.has(marker)) return false;
    return marker[0] !== "_" || !WORD.test(this.source[this.at - 1] ?? " ");
  }

  // Where the marker closes: after a visible character, outside of code, not as part of a longer run.
  closer(marker, start) {
    const { source } = this;
    for (let at = start; at < source.length; at += 1) {
      if (source[at] === "\\") at += 1;
      else if (source[at] === "`") {
        const end = this.runEnd(at);
        const close = this.closingRun(end, end - at);
        at = close < 0 ? end - 1 : close + (end - at) - 1;
      } else if (source[at] === marker[0]) {
        let end = at;
        while (source[end] === marker[0]) end += 1;
        // A run of three closes two kinds at once: the inner one gets the first of it.
        const fits = end - at === marker.length || (end - at === 3 && marker.length < 3);
        if (fits && at > start && /\S/.test(source[at - 1]) && this.closes(marker, end)) return end - marker.length;
        at = end - 1;
      }
    }
    this.unclosed.add(marker);
    return -1;
  }

  closes(marker, end) {
    return marker[0] !== "_" || !WORD.test(this.source[end] ?? " ");
  }
}

// Where each square bracket closes, found in one pass.
function bracketPairs(source) {
  const pairs = new Map();
  const open = [];
  for (let at = 0; at < source.length; at += 1) {
    if (source[at] === "\\") at += 1;
    else if (source[at] === "[") open.push(at);
    else if (source[at] === "]" && open.length) pairs.set(open.pop(), at);
  }
  return pairs;
}

// A link inside a link would be two targets for one click.
function withoutLinks(nodes) {
  return nodes.flatMap((node) => {
    if (node.type === "link") return withoutLinks(node.children);
    return node.children ? [{ ...node, children: withoutLinks(node.children) }] : [node];
  });
}

// Punctuation behind an address belongs to the sentence, a closing bracket only if it was opened inside.
function withoutTail(address) {
  let spare = address.split(")").length - address.split("(").length; // brackets closed and never opened
  let end = address.length;
  for (; end > 0; end -= 1) {
    const sign = address[end - 1];
    if (!/[.,;:!?*_~)\]]/.test(sign) || (sign === ")" && spare <= 0)) break;
    if (sign === ")") spare -= 1;
  }
  return address.slice(0, end);
}
