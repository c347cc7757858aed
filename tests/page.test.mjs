// Unit tests of the page's pure functions; run with `node --test tests/page.test.mjs`.

import assert from "node:assert/strict";
import test from "node:test";

import {
  formatDuration,
  formatNumber,
  formatPercent,
  onOneLine,
  tokenLabel,
} from "../nanogpt/web/format.js";
import {
  decodeByteTokens,
  downsample,
  isByteToken,
  lastIndexAtMost,
  shadesFromBits,
  splitAtPassages,
  timeTicks,
} from "../nanogpt/web/series.js";

test("formatNumber keeps decimals, groups thousands and dashes what is unknown", () => {
  assert.equal(formatNumber(1234.5, 2), "1,234.50");
  assert.equal(formatNumber(null), "–");
  assert.equal(formatNumber(Infinity), "–");
});

test("formatPercent shows one decimal below 10 %", () => {
  assert.equal(formatPercent(0.5), "50 %");
  assert.equal(formatPercent(0.0994), "9.9 %");
  assert.equal(formatPercent(0.0996), "10 %");
  assert.equal(formatPercent(0), "0 %");
});

test("formatDuration uses the two largest units", () => {
  assert.equal(formatDuration(59.4), "59 s");
  assert.equal(formatDuration(59.6), "1 min 0 s");
  assert.equal(formatDuration(3725), "1 h 2 min");
  assert.equal(formatDuration(NaN), "–");
});

test("tokenLabel names white space", () => {
  assert.equal(tokenLabel("\n"), "new line");
  assert.equal(tokenLabel(" \u2003"), "space, blank");
  assert.equal(tokenLabel("a\nb"), "a↵b");
  assert.equal(onOneLine("a\n\nb"), "a↵↵b");
});

test("lastIndexAtMost finds the last value that is not above the limit", () => {
  const values = [1, 2, 2, 5];
  assert.deepEqual([0, 1, 2, 4, 5, 9].map((x) => lastIndexAtMost(values, x)), [-1, 0, 2, 2, 3, 3]);
  assert.equal(lastIndexAtMost([], 3), -1);
});

test("downsample averages neighbours and keeps the last x", () => {
  const x = Array.from({ length: 1000 }, (_, i) => i);
  const points = downsample(x, x, 10);
  assert.equal(points.x.length, 10);
  assert.equal(points.x.at(-1), 999);
  assert.equal(points.y[0], 49.5);
  assert.deepEqual(downsample([1, 2], [null, null], 1), { x: [2], y: [null] });
  assert.deepEqual(downsample([1, 2, 3], [1, null, 3], 9), { x: [1, 2, 3], y: [1, null, 3] });
});

test("timeTicks stand at round times", () => {
  const { tickvals, ticktext } = timeTicks(600, 600, 8);
  assert.deepEqual(tickvals, [0, 120, 240, 360, 480, 600]);
  assert.deepEqual(ticktext.slice(0, 2), ["0 s", "2 min"]);
});

test("shadesFromBits shows the bits of a character at its last token", () => {
  assert.deepEqual(shadesFromBits(["a", "", "é"], [5, 2, 4]), [0.5, 0, 0.6]);
  assert.deepEqual(shadesFromBits(["x"], [99]), [1]);
});

test("byte tokens form a character once they are complete", () => {
  assert.ok(isByteToken("bytes:\\xd0"));
  assert.ok(!isByteToken("bytes"));
  assert.equal(decodeByteTokens(["bytes:\\xd0", "bytes:\\xb6"]), "ж");
  assert.equal(decodeByteTokens(["bytes:\\xd0"]), null);
});

test("splitAtPassages marks passages in text order", () => {
  const passages = [
    { start: 3, end: 5 },
    { start: 0, end: 1 },
  ];
  assert.deepEqual(splitAtPassages([..."abcdef"], passages), [
    { text: "a", passage: 1 },
    { text: "bc", passage: null },
    { text: "de", passage: 0 },
    { text: "f", passage: null },
  ]);
});
