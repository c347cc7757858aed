// Sequences of numbers and tokens. Nothing here touches the document.

const MAX_BITS = 10; // one in a thousand; shades get no deeper

/**
 * Return the index of the last of ascending values that is at most `limit`, or -1.
 * @param {number[]} values
 */
export function lastIndexAtMost(values, limit) {
  let low = 0;
  let high = values.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (values[middle] <= limit) low = middle + 1;
    else high = middle;
  }
  return low - 1;
}

/**
 * Reduce a curve to at most `count` points, each the mean of its neighbours.
 * @param {number[]} x
 * @param {?number[]} y null where unknown
 * @returns {{x: number[], y: ?number[]}}
 */
export function downsample(x, y, count, start = 0, end = x.length) {
  const width = Math.max(1, (end - start) / count);
  const points = { x: [], y: [] };
  for (let left = start; left < end; left += width) {
    const first = Math.floor(left);
    const stop = Math.min(end, Math.max(first + 1, Math.floor(left + width)));
    const known = y.slice(first, stop).filter((value) => value !== null);
    points.x.push(x[stop - 1]);
    points.y.push(known.length ? known.reduce((sum, value) => sum + value) / known.length : null);
  }
  return points;
}

/**
 * Return tick positions and labels for a time axis: at most about `count` in the visible range.
 * @param {number} visible seconds in view
 * @param {number} maxSeconds
 */
export function timeTicks(visible, maxSeconds, count) {
  const units = [1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21600, 86400];
  const unit = units.find((size) => visible / size <= count) ?? 604800;
  const tickvals = Array.from({ length: Math.floor(maxSeconds / unit) + 1 }, (_, i) => i * unit);
  return { tickvals, ticktext: tickvals.map(timeLabel) };
}

function timeLabel(seconds) {
  if (seconds < 60) return `${seconds} s`;
  return seconds < 3600 ? `${seconds / 60} min` : `${seconds / 3600} h`;
}

/**
 * Return a shade from 0 to 1 for each token. Where several tokens form one character, the last
 * one, which has its text, shows the bits of all.
 * @param {string[]} texts
 * @param {number[]} bits
 */
export function shadesFromBits(texts, bits) {
  let pending = 0;
  return texts.map((text, i) => {
    pending += bits[i];
    if (!text) return 0;
    const shade = Math.min(1, pending / MAX_BITS);
    pending = 0;
    return shade;
  });
}

const BYTE_TOKEN = /^bytes:(\\x[0-9a-f]{2})+$/; // part of a character, as the server writes it

/** @param {string} token */
export function isByteToken(token) {
  return BYTE_TOKEN.test(token);
}

/**
 * Return the character that byte tokens such as "bytes:\\xe6" form; null if incomplete.
 * @param {string[]} tokens
 */
export function decodeByteTokens(tokens) {
  const hex = tokens.flatMap((token) => token.match(/[0-9a-f]{2}(?=\\|$)/g));
  const bytes = Uint8Array.from(hex, (digits) => parseInt(digits, 16));
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(bytes);
  } catch {
    return null;
  }
}

/**
 * Split a text into unmarked and marked parts. Passages do not overlap; offsets count characters.
 * @param {string[]} chars
 * @param {{start: number, end: number}[]} passages
 * @returns {{text: string, passage: ?number}[]}
 */
export function splitAtPassages(chars, passages) {
  const parts = [];
  let end = 0;
  const order = passages.map((passage, index) => ({ ...passage, index }));
  order.sort((a, b) => a.start - b.start);
  for (const passage of order) {
    parts.push({ text: chars.slice(end, passage.start).join(""), passage: null });
    parts.push({
      text: chars.slice(passage.start, passage.end).join(""),
      passage: passage.index,
    });
    end = passage.end;
  }
  parts.push({ text: chars.slice(end).join(""), passage: null });
  return parts.filter((part) => part.text);
}
