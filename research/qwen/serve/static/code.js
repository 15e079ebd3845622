// Colours for code: strings, comments, numbers and the commonest keywords, enough to read by.
// One scan over the text with sticky patterns; whatever no pattern knows stays plain.

const WORDS = {
  python:
    "and as assert async await break case class continue def del elif else except False finally for from global if import in is lambda match None nonlocal not or pass raise return True try while with yield self",
  script:
    "abstract async await boolean break case catch class const continue default do else enum export extends false final finally for from function if implements import in instanceof interface let new null of private protected public return static super switch this throw true try type typeof undefined var void while yield",
  system:
    "auto bool break case char class const continue default defer delete do double else enum extern false float fn for func go if impl import include int interface let long loop map match mod mut namespace new nil nullptr package private public pub return self short signed sizeof static struct super switch template this trait true type typedef union unsigned use using virtual void where while",
  shell: "case do done elif else esac export fi for function if in local return set then until while echo exit cd sudo",
  sql: "add all alter and as asc between by case create delete desc distinct drop else end exists from group having in inner insert into is join left like limit not null on or order outer right select set table then union update values when where with",
  data: "true false null yes no",
};
const FAMILIES = {
  python: ["python", "py", "python3"],
  script: ["javascript", "js", "typescript", "ts", "jsx", "tsx", "java", "kotlin", "swift", "dart", "php"],
  system: ["c", "cpp", "c++", "h", "rust", "rs", "go", "cs", "csharp", "objc"],
  shell: ["bash", "sh", "shell", "zsh", "console", "dockerfile", "makefile"],
  sql: ["sql", "mysql", "sqlite", "postgresql"],
  data: ["json", "yaml", "yml", "toml", "ini"],
};
const COMMENTS = {
  python: /#[^\n]*/y,
  shell: /#[^\n]*/y,
  data: /#[^\n]*/y,
  sql: /--[^\n]*/y,
  script: /\/\/[^\n]*|\/\*(?:[^*]|\*(?!\/))*(?:\*\/)?/y,
  system: /\/\/[^\n]*|\/\*(?:[^*]|\*(?!\/))*(?:\*\/)?/y,
};
const STRING = /"""(?:[^"]|"(?!""))*(?:""")?|'''(?:[^']|'(?!''))*(?:''')?|"(?:[^"\\\n]|\\.)*"?|'(?:[^'\\\n]|\\.)*'?|`(?:[^`\\]|\\.)*`?/y;
const NUMBER = /(?:0[xX][\da-fA-F_]+|\d[\d_]*(?:\.\d+)?(?:[eE][+-]?\d+)?)\b/y;
const WORD = /[\p{L}_$][\p{L}\p{N}_$]*/uy;
const OTHER = /[^\p{L}\p{N}_$"'`#/-]+|./suy;
const LONGEST = 60_000; // longer code stays plain

/** Pieces [kind, text] of the code; kind is "", "comment", "string", "number", "keyword" or "call". */
export function highlight(text, language) {
  const family = familyOf(language);
  if (!family || text.length > LONGEST) return [["", text]];
  const keywords = new Set(WORDS[family].split(" "));
  const pieces = [];
  for (let at = 0; at < text.length; ) {
    const [kind, piece] = pieceAt(text, at, family, keywords);
    const last = pieces.at(-1);
    if (last && last[0] === kind) last[1] += piece;
    else pieces.push([kind, piece]);
    at += piece.length;
  }
  return pieces;
}

function familyOf(language) {
  const name = language.toLowerCase();
  return Object.keys(FAMILIES).find((family) => FAMILIES[family].includes(name));
}

function pieceAt(text, at, family, keywords) {
  const comment = match(COMMENTS[family], text, at);
  if (comment) return ["comment", comment];
  const string = match(STRING, text, at);
  if (string) return ["string", string];
  const number = match(NUMBER, text, at);
  if (number) return ["number", number];
  const word = match(WORD, text, at);
  if (!word) return ["", match(OTHER, text, at)];
  if (keywords.has(family === "sql" ? word.toLowerCase() : word)) return ["keyword", word];
  return [text[at + word.length] === "(" ? "call" : "", word];
}

function match(pattern, text, at) {
  pattern.lastIndex = at;
  return pattern.exec(text)?.[0] ?? "";
}
