// What places on a page offer to a flaw, whether a flaw is there, and which texts lie over one another; see broken.py.
// A function expression: each place is [x, y, tag], the element of that tag at a point, or [-1, number] of an element.
places => {
  const all = [...document.body.querySelectorAll('*')].filter(el => el.localName !== 'tbody');  // no source names those
  const tags = all.map(el => el.localName), numbers = new Map(all.map((el, n) => [el, n]));
  const rect = e => {
    const r = e.getBoundingClientRect();
    return [r.left, r.top, r.right, r.bottom].map(Math.round);
  };
  const range = document.createRange();
  const ink = e => {  // what its text takes, which is often less than its box
    range.selectNodeContents(e);
    const r = range.getBoundingClientRect();
    return [r.left, r.top, r.right, r.bottom].map(Math.round);
  };
  const own = e => [...e.childNodes].filter(n => n.nodeType === 3 && n.data.trim());
  const text = e => (e.innerText || '').replace(/\s+/g, ' ').trim();
  const size = e => parseFloat(getComputedStyle(e).fontSize);
  const facts = all.map(e => ({box: rect(e), text: text(e), own: own(e).length > 0, size: size(e)}));
  const apart = (a, b) => a !== b && !a.contains(b) && !b.contains(a);
  const written = all.map((e, n) => n).filter(n => facts[n].own && facts[n].box[2] > facts[n].box[0]);

  const strips = e => own(e).flatMap(node => {  // its own text, line by line
    range.selectNodeContents(node);
    return [...range.getClientRects()].filter(r => r.width > 1 && r.height > 1);
  });
  const lines = new Map(written.map(n => [n, strips(all[n])]));
  const shared = (a, b) => {  // part of the smaller strip that both take
    const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left), high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    return wide <= 0 || high <= 0 ? 0 : wide * high / Math.min(a.width * a.height, b.width * b.height);
  };
  const under = n => written.filter(m => apart(all[m], all[n]) &&
    lines.get(m).some(a => (lines.get(n) || []).some(b => shared(a, b) >= 0.3)));

  const gap = el => {  // the least space between the children of a row or grid that spaces them, 0 in any other
    const style = getComputedStyle(el.parentElement);
    if (!/flex|grid/.test(style.display)) return 0;
    const boxes = [...el.parentElement.children].filter(e => rect(e)[2] > rect(e)[0]).map(rect);
    boxes.sort((a, b) => a[0] - b[0] || a[1] - b[1]);
    if (boxes.length < 2) return 0;
    const across = boxes.slice(1).map((b, n) => b[0] - boxes[n][2]).filter(d => d >= 0);
    const down = [...boxes].sort((a, b) => a[1] - b[1]).map((b, n, list) => n ? b[1] - list[n - 1][3] : -1).filter(d => d >= 0);
    return Math.min(...(across.length ? across : down.length ? down : [0]));
  };
  const spaced = el => {
    const style = getComputedStyle(el.parentElement);
    return gap(el) >= 5 && Math.max(parseFloat(style.columnGap) || 0, parseFloat(style.rowGap) || 0) >= 5;
  };
  const lift = el => {  // space to what stands above it in a flow of blocks, -1 where nothing does
    if (/flex|grid|table/.test(getComputedStyle(el.parentElement).display)) return -1;
    let above = el.previousElementSibling;
    while (above && rect(above)[3] === rect(above)[1]) above = above.previousElementSibling;
    return above ? rect(el)[1] - rect(above)[3] : -1;
  };
  const holder = el => {  // the nearest of it and what holds it, and little else, that is spaced from what is beside or above
    for (let at = el; at !== document.body && numbers.has(at); at = at.parentElement) {
      if (written.filter(n => at.contains(all[n])).length > 4) return null;  // what has much in it is not seen as one thing
      if (spaced(at) || lift(at) >= Math.max(6, 0.5 * size(at))) return at;
    }
    return null;
  };

  const found = ([x, y, tag]) => {
    let el = x < 0 ? all[y] : document.elementFromPoint(x, y);
    while (el && x >= 0 && el.localName !== tag) el = el.parentElement;
    return numbers.has(el) ? el : null;
  };
  return {tags, places: places.map(place => {
    const el = found(place);
    if (!el) return null;
    const number = numbers.get(el), mine = facts[number], box = mine.box, inked = ink(el);
    const others = all.map((e, n) => n).filter(n => n !== number && facts[n].text && tags[n] === tags[number]);
    const alike = others.filter(n => all[n].className === el.className);
    const left = n => Math.abs(facts[n].box[0] - box[0]) <= 1 && facts[n].box[1] !== box[1];
    const top = n => Math.abs(facts[n].box[1] - box[1]) <= 1 && facts[n].box[0] !== box[0];
    const over = written.filter(n => apart(all[n], el) && facts[n].text.length <= 40)
      .map(n => ({box: ink(all[n]), text: facts[n].text}))
      .filter(o => o.box[3] <= box[1] + 1 && o.box[1] >= 0 && Math.min(o.box[2], inked[2]) - Math.max(o.box[0], inked[0]) > 12)
      .sort((a, b) => b.box[3] - a.box[3]);
    const held = holder(el);
    return {number, box, ink: inked, size: mine.size, room: innerWidth - inked[2], above: over[0] || null,
      alike: others.filter(n => facts[n].size === mine.size).length, column: alike.filter(left).length,
      row: alike.filter(top).length, edge: written.filter(n => apart(all[n], el) && left(n)).length, gap: gap(el),
      lift: lift(el), holder: held ? numbers.get(held) : -1, spacer: held && spaced(held) ? numbers.get(held.parentElement) ?? -1 : -1,
      above_margin: held && held.previousElementSibling ? parseFloat(getComputedStyle(held.previousElementSibling).marginBottom) : 0,
      under: under(number)};
  })};
}
