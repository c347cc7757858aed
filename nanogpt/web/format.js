// Numbers and tokens as text. Nothing here touches the document.

const WHITESPACE_NAMES = {
  "\n": "new line",
  "\t": "tab",
  "\r": "carriage return",
  " ": "space",
  "\u00a0": "no-break space",
  "": "part of a character",
};

/**
 * Format a number with a fixed number of decimals; a dash if it is not finite.
 * @param {?number} value
 */
export function formatNumber(value, digits = 0) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  return value.toLocaleString("en", {
    minimumFractionDigits: digits,
    maximumFractionDigits: digits,
  });
}

/**
 * Format a fraction as per cent, with one decimal below 10 %.
 * @param {number} fraction
 */
export function formatPercent(fraction) {
  const digits = fraction < 0.0995 && fraction > 0 ? 1 : 0;
  return `${formatNumber(100 * fraction, digits)} %`;
}

/** @param {number} seconds */
export function formatDuration(seconds) {
  if (!Number.isFinite(seconds)) return "–";
  const rounded = Math.round(seconds);
  const hours = Math.floor(rounded / 3600);
  const minutes = Math.floor((rounded % 3600) / 60);
  if (hours) return `${hours} h ${minutes} min`;
  return minutes ? `${minutes} min ${rounded % 60} s` : `${rounded} s`;
}

/**
 * Return a token's name for a list: its text, or the name of its white space.
 * @param {string} text
 */
export function tokenLabel(text) {
  if (text in WHITESPACE_NAMES) return WHITESPACE_NAMES[text];
  if (text.trim() !== "") return text.replaceAll("\n", "↵");
  return [...text].map((char) => WHITESPACE_NAMES[char] ?? "blank").join(", ");
}

/**
 * Return the text on one line, with a mark for each line end.
 * @param {string} text
 */
export function onOneLine(text) {
  return text.replaceAll("\n", "↵");
}
