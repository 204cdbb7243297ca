// What a place on a page offers to a flaw, and whether the flaw is there; see broken.py.
// A function expression: (x, y, tag) finds the element of that tag at a point; x = -1 takes the number y instead.
(x, y, tag) => {
  const all = [...document.body.querySelectorAll('*')].filter(el => el.localName !== 'tbody');  // no source names those
  let el = x < 0 ? all[y] : document.elementFromPoint(x, y);
  while (el && x >= 0 && el.localName !== tag) el = el.parentElement;
  const number = all.indexOf(el);
  if (number < 0) return null;
  const rect = e => {
    const r = e.getBoundingClientRect();
    return [r.left, r.top, r.right, r.bottom].map(Math.round);
  };
  const ink = e => {  // what its text takes, which is often less than its box
    const range = document.createRange();
    range.selectNodeContents(e);
    const r = range.getBoundingClientRect();
    return [r.left, r.top, r.right, r.bottom].map(Math.round);
  };
  const style = getComputedStyle(el), mine = rect(el), parent = el.parentElement;
  const text = e => (e.innerText || '').replace(/\s+/g, ' ').trim();
  const alike = all.filter(e => e !== el && e.localName === el.localName && e.className === el.className && text(e));
  const same = alike.filter(e => getComputedStyle(e).fontSize === style.fontSize);
  const column = alike.filter(e => Math.abs(rect(e)[0] - mine[0]) <= 1 && rect(e)[1] !== mine[1]);
  const over = all.filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) && e !== el &&
    !el.contains(e) && !e.contains(el) && text(e).length <= 40).map(e => ({box: ink(e), text: text(e)}))
    .filter(o => o.box[3] <= mine[1] + 1 && o.box[1] >= 0 && Math.min(o.box[2], ink(el)[2]) - Math.max(o.box[0], ink(el)[0]) > 12)
    .sort((a, b) => b.box[3] - a.box[3]);
  const gaps = [...parent.children].filter(e => rect(e)[2] > rect(e)[0]).map(rect).sort((a, b) => a[0] - b[0] || a[1] - b[1]);
  const flexed = /flex|grid/.test(getComputedStyle(parent).display);
  let gap = 0;
  if (flexed && gaps.length > 1) {
    const across = gaps.slice(1).map((g, n) => g[0] - gaps[n][2]).filter(d => d >= 0);
    const down = [...gaps].sort((a, b) => a[1] - b[1]).map((g, n, list) => n ? g[1] - list[n - 1][3] : -1).filter(d => d >= 0);
    gap = Math.min(...(across.length ? across : down.length ? down : [0]));
  }
  return {number, parent: all.indexOf(parent), tags: all.map(e => e.localName), box: mine, size: parseFloat(style.fontSize),
    alike: same.length, inline: column.length, above: over[0] || null, gap, room: innerWidth - ink(el)[2],
    ink: ink(el)};
}
