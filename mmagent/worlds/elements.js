// Reads what a person can see on a page: elements with box, role, text and colour, and the lines of text.
// A function expression: (root selector, most elements) => {elements: [...], lines: [...]}; see elements.py.
(selector, most) => {
  const width = innerWidth, height = innerHeight;
  const root = document.querySelector(selector) || document.body;
  const ROLES = new Set(['button', 'link', 'checkbox', 'radio', 'tab', 'slider', 'spinbutton', 'combobox', 'menuitem',
    'option', 'switch', 'textbox', 'heading', 'img', 'cell', 'columnheader', 'dialog', 'progressbar', 'listitem']);
  const TAGS = {button: 'button', textarea: 'textbox', select: 'combobox', option: 'option', img: 'image',
    canvas: 'image', h1: 'heading', h2: 'heading', h3: 'heading', h4: 'heading', h5: 'heading', h6: 'heading',
    td: 'cell', th: 'columnheader', li: 'listitem', label: 'label', progress: 'progressbar', rect: 'shape',
    circle: 'shape', ellipse: 'shape', polygon: 'shape', text: 'text'};
  const INPUTS = {checkbox: 'checkbox', radio: 'radio', range: 'slider', button: 'button', submit: 'button',
    reset: 'button', image: 'button', number: 'textbox', color: 'button', file: 'button'};
  const clean = text => (text || '').replace(/\s+/g, ' ').trim();
  const canvas = document.createElement('canvas');
  canvas.width = canvas.height = 1;
  const paint = canvas.getContext('2d', {willReadFrequently: true});
  const known = new Map();

  const rgba = color => {  // any CSS colour to [r, g, b, a], through the browser's own parser
    if (!known.has(color)) {
      const plain = /^rgba?\((\d+), (\d+), (\d+)(?:, ([\d.]+))?\)$/.exec(color);
      if (plain) known.set(color, [+plain[1], +plain[2], +plain[3], plain[4] === undefined ? 1 : +plain[4]]);
      else {
        paint.clearRect(0, 0, 1, 1);
        paint.fillStyle = color;
        paint.fillRect(0, 0, 1, 1);
        const [r, g, b, a] = paint.getImageData(0, 0, 1, 1).data;
        known.set(color, [r, g, b, a / 255]);
      }
    }
    return known.get(color);
  };
  const hex = ([r, g, b]) => '#' + [r, g, b].map(v => Math.round(v).toString(16).padStart(2, '0')).join('');
  const background = el => {  // what lies under the element's text: translucent layers blended, white at the bottom
    const layers = [];
    for (let at = el; at instanceof Element; at = at.parentElement) {
      const layer = rgba(getComputedStyle(at).backgroundColor);
      if (layer[3] > 0) layers.push(layer);
      if (layer[3] >= 1) break;
    }
    return hex(layers.reverse().reduce((under, [r, g, b, a]) =>
      [r * a + under[0] * (1 - a), g * a + under[1] * (1 - a), b * a + under[2] * (1 - a)], [255, 255, 255]));
  };
  const ownText = el => [...el.childNodes].some(node => node.nodeType === 3 && node.data.trim());
  const role = (el, style) => {
    const tag = el.localName, given = el.getAttribute('role');
    if (given && ROLES.has(given)) return given === 'img' ? 'image' : given;
    if (tag === 'input') return el.type === 'hidden' ? null : INPUTS[el.type] || 'textbox';
    if (tag === 'a' && el.hasAttribute('href')) return 'link';
    if (el.classList.contains('alink')) return 'link';
    if (TAGS[tag] && !(tag === 'li' && !ownText(el))) return TAGS[tag];
    if (ownText(el)) return tag === 'tspan' ? null : 'text';
    const leaf = !el.firstElementChild && !el.textContent.trim();
    if (leaf && !(el instanceof SVGElement) && rgba(style.backgroundColor)[3] === 1) return 'box';
    return null;
  };
  const name = el => {
    const tag = el.localName;
    if (tag === 'input' && ['button', 'submit', 'reset'].includes(el.type)) return clean(el.value);
    if (tag === 'img') return clean(el.alt);
    if (tag === 'select') return clean(el.selectedOptions[0] && el.selectedOptions[0].text);
    if (tag === 'input' || tag === 'textarea') {
      const label = el.labels && el.labels[0];
      const before = el.previousElementSibling;  // a label that says what it labels by its place alone
      return clean(el.getAttribute('aria-label') || (label && label.textContent) || el.placeholder ||
        (before && before.localName === 'label' && before.textContent));
    }
    return clean(el.innerText !== undefined ? el.innerText : el.textContent) || clean(el.getAttribute('aria-label')) ||
      clean(el.title);
  };
  const clip = rect => [Math.max(0, Math.floor(rect.left)), Math.max(0, Math.floor(rect.top)),
    Math.min(width, Math.ceil(rect.right)), Math.min(height, Math.ceil(rect.bottom))];
  const COLUMNS = [0.5, 0.3, 0.7, 0.12, 0.88], ROWS = [0.5, 0.2, 0.8];

  const elements = [];
  const walk = el => {
    const style = getComputedStyle(el);
    if (style.display === 'none' || +style.opacity === 0) return;
    if (elements.length < most && style.visibility === 'visible') look(el, style);
    if (el.getAttribute('role') === 'img') return;  // one picture, whatever it is made of
    for (const child of el.children) walk(child);
  };
  const look = (el, style) => {
    const kind = role(el, style);
    if (!kind) return;
    const box = clip(el.getBoundingClientRect());
    if (box[2] - box[0] < 2 || box[3] - box[1] < 2) return;
    const pieces = [...el.getClientRects()].map(clip).filter(([x1, y1, x2, y2]) => x2 - x1 > 1 && y2 - y1 > 1);
    const [x1, y1, x2, y2] = pieces[0] || box;  // a link broken over two lines is clicked on its first
    let seen = 0, point = null;
    for (const row of ROWS) for (const column of COLUMNS) {
      const x = Math.floor(x1 + (x2 - x1) * column) + 0.5, y = Math.floor(y1 + (y2 - y1) * row) + 0.5;
      const hit = document.elementFromPoint(x, y);
      if (!hit || !(hit === el || el.contains(hit))) continue;
      seen += 1;
      point = point || [x, y];
    }
    if (!seen) return;
    const svg = el instanceof SVGElement, form = 'disabled' in el;
    const aria = el.getAttribute('aria-checked') || el.getAttribute('aria-selected');
    elements.push({
      box, text: name(el).slice(0, 200), role: kind, tag: el.localName, color: hex(rgba(svg ? style.fill : style.color)),
      background: background(svg ? el.parentElement : el), visible: seen / (ROWS.length * COLUMNS.length), point,
      value: 'value' in el && kind !== 'button' && kind !== 'listitem' ? String(el.value).slice(0, 200) : '',
      checked: kind === 'checkbox' || kind === 'radio' ? !!el.checked || aria === 'true' : aria ? aria === 'true' : null,
      enabled: !(form && el.disabled), focused: document.activeElement === el,
    });
  };
  walk(root);

  const lines = [];
  const range = document.createRange();
  const nodes = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
  for (let node = nodes.nextNode(); node && lines.length < most; node = nodes.nextNode()) {
    const parent = node.parentElement;
    if (!node.data.trim() || ['SCRIPT', 'STYLE', 'OPTION', 'NOSCRIPT', 'TEXTAREA'].includes(parent.tagName)) continue;
    const style = getComputedStyle(parent);
    if (style.visibility !== 'visible' || +style.opacity === 0) continue;
    let line = null;
    const finish = () => {
      if (!line) return;
      const [x1, y1, x2, y2] = line.box = clip({left: line.left, top: line.top, right: line.right, bottom: line.bottom});
      const whole = line.left >= -0.5 && line.top >= -0.5 && line.right <= width + 0.5 && line.bottom <= height + 0.5;
      const clear = whole && [0.05, 0.5, 0.95].every(part => {
        const hit = document.elementFromPoint(x1 + (x2 - x1) * part, (y1 + y2) / 2);
        return hit && (hit === parent || parent.contains(hit) || hit.contains(parent) && hit !== root);
      });
      if (clear && x2 - x1 > 1 && y2 - y1 > 1)
        lines.push({box: line.box, text: line.words.join(' '), color: hex(rgba(parent instanceof SVGElement ?
          style.fill : style.color)), background: background(parent), size: parseFloat(style.fontSize)});
      line = null;
    };
    for (const word of node.data.matchAll(/\S+/g)) {
      range.setStart(node, word.index);
      range.setEnd(node, word.index + word[0].length);
      const rects = range.getClientRects();
      if (rects.length !== 1) { finish(); continue; }  // not drawn, or broken inside a word
      const rect = rects[0];
      const shown = style.textTransform === 'uppercase' ? word[0].toUpperCase() :
        style.textTransform === 'lowercase' ? word[0].toLowerCase() :
        style.textTransform === 'capitalize' ? word[0][0].toUpperCase() + word[0].slice(1) : word[0];
      if (line && Math.abs(rect.top - line.top) < 2 && rect.left >= line.right - 1) {
        line.words.push(shown);
        line.right = rect.right;
        line.bottom = Math.max(line.bottom, rect.bottom);
      } else {
        finish();
        line = {words: [shown], left: rect.left, top: rect.top, right: rect.right, bottom: rect.bottom};
      }
    }
    finish();
  }
  return {elements, lines};
}
