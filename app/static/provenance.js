// Tints the words of answers that were drafted and accepted, without touching the page's elements: ranges over
// the rendered text, painted by the browser's highlights (::highlight(drafted) in the style sheet).
//
// The ranges that the server names are of the answer's markdown source. Source and rendered text are aligned
// word by word; a word that finds no certain partner (markdown syntax, formulas, labels) is left untinted.
(() => {
  const WORD = /[\p{L}\p{N}\p{M}]+/gu;
  const LOOKAHEAD = 60; // words that either side may have alone, between two common ones
  const PAUSE = 150; // ms between two looks while an answer streams
  let enabled = false;
  let timer = 0;

  // What the renderer drops, blanked in place: list numbers, the language of a code block, link targets.
  function blank(source) {
    const spaces = (found) => " ".repeat(found.length);
    return source
      .replace(/^[ \t>]*\d{1,9}[.)](?=\s)/gm, spaces)
      .replace(/^[ \t>]*(?:```|~~~)[^\n`]*$/gm, spaces)
      .replace(/\]\([^()\s]*(?:\s+"[^"]*")?\)/g, spaces);
  }

  const words = (text) => Array.from(text.matchAll(WORD), (m) => ({ word: m[0], start: m.index }));

  // Pairs [i, j] of equal words, both rising. After a difference the nearest place counts where two words in
  // a row agree (or the last one of both): one alone may be chance.
  function align(a, b) {
    const pairs = [];
    const same = (i, j) => i < a.length && j < b.length && a[i].word === b[j].word;
    const certain = (i, j) =>
      same(i, j) && (same(i + 1, j + 1) || (i + 1 === a.length && j + 1 === b.length));
    let i = 0;
    let j = 0;
    while (i < a.length && j < b.length) {
      if (same(i, j)) {
        pairs.push([i++, j++]);
        continue;
      }
      let found = null;
      for (let skipped = 1; skipped <= LOOKAHEAD && !found; skipped++) {
        for (let mine = 0; mine <= skipped && !found; mine++) {
          if (certain(i + mine, j + skipped - mine)) found = [i + mine, j + skipped - mine];
        }
      }
      if (!found) break;
      [i, j] = found;
    }
    return pairs;
  }

  // Python counts code points, JavaScript UTF-16 units.
  function units(text, ranges) {
    if (!/[\ud800-\udfff]/.test(text)) return ranges;
    const at = [];
    let unit = 0;
    for (const character of text) {
      at.push(unit);
      unit += character.length;
    }
    at.push(unit);
    return ranges.map(([from, to]) => [at[from] ?? unit, at[to] ?? unit]);
  }

  // The rendered text with the node that each part of it comes from. Blocks are kept apart, so that words of
  // two paragraphs do not join.
  function rendered(element) {
    const skip = "button, script, style, .katex, [aria-hidden='true'], svg";
    const walker = document.createTreeWalker(element, NodeFilter.SHOW_TEXT, {
      acceptNode: (node) =>
        node.parentElement.closest(skip) ? NodeFilter.FILTER_REJECT : NodeFilter.FILTER_ACCEPT,
    });
    const parts = [];
    let text = "";
    let last = null;
    while (walker.nextNode()) {
      const node = walker.currentNode;
      const block = node.parentElement.closest("p, li, td, th, pre, h1, h2, h3, h4, h5, h6, blockquote, div");
      if (last && block !== last) text += "\n";
      last = block;
      parts.push({ node, start: text.length });
      text += node.data;
    }
    return { text, parts };
  }

  function addRange(parts, from, to, highlight) {
    const place = (offset, end) => {
      let low = 0;
      let high = parts.length - 1;
      while (low < high) {
        const middle = (low + high + 1) >> 1;
        if (parts[middle].start < offset || (!end && parts[middle].start === offset)) low = middle;
        else high = middle - 1;
      }
      const part = parts[low];
      return [part.node, Math.min(offset - part.start, part.node.data.length)];
    };
    const range = new StaticRange({
      startContainer: place(from, false)[0], startOffset: place(from, false)[1],
      endContainer: place(to, true)[0], endOffset: place(to, true)[1],
    });
    highlight.add(range);
  }

  function tintAnswer(element, answer, highlight) {
    const ranges = units(answer.text, answer.drafted);
    const { text, parts } = rendered(element);
    if (!parts.length) return;
    const source = words(blank(answer.text));
    const shown = words(text);
    let next = 0;
    for (const [i, j] of align(source, shown)) {
      const { word, start } = source[i];
      const end = start + word.length;
      while (next < ranges.length && ranges[next][1] <= start) next++;
      for (let r = next; r < ranges.length && ranges[r][0] < end; r++) {
        const from = shown[j].start + Math.max(0, ranges[r][0] - start);
        addRange(parts, from, shown[j].start + Math.min(word.length, ranges[r][1] - start), highlight);
      }
    }
  }

  function paint() {
    timer = 0;
    if (!window.CSS?.highlights || typeof Highlight === "undefined") return;
    CSS.highlights.delete("drafted");
    const holder = document.querySelector("#provenance [data-answers]");
    if (!enabled || !holder) return;
    const answers = JSON.parse(holder.dataset.answers);
    const elements = document.querySelectorAll("#conversation .bot.message");
    const highlight = new Highlight();
    answers.forEach((answer, place) => {
      if (answer && elements[place]) tintAnswer(elements[place], answer, highlight);
    });
    CSS.highlights.set("drafted", highlight);
  }

  const later = () => { timer ||= setTimeout(paint, PAUSE); };

  window.slipstreamTint = (on) => {
    enabled = Boolean(on);
    later();
  };

  // For tests: the texts that are tinted now.
  window.slipstreamTinted = () => {
    const ranges = Array.from(CSS.highlights?.get("drafted") ?? []);
    return ranges.map((r) => {
      const live = document.createRange();
      live.setStart(r.startContainer, r.startOffset);
      live.setEnd(r.endContainer, r.endOffset);
      return live.toString();
    });
  };

  new MutationObserver((changes) => {
    if (enabled && changes.some((c) => c.target.parentElement?.closest("#conversation, #provenance") ||
      c.target.closest?.("#conversation, #provenance"))) later();
  }).observe(document, { subtree: true, childList: true, characterData: true, attributes: true,
    attributeFilter: ["data-answers"] });
})();
