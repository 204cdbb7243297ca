// Reads what a person can see on a page: elements with box, role, text and colour, and the lines of text.
// A function expression: (root selector, most elements) => {elements, groups, lines, unread}; see elements.py.
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
  const grounds = new Map();
  const background = el => {
    if (!grounds.has(el)) grounds.set(el, blended(el));
    return grounds.get(el);
  };
  const blended = el => {  // what lies under the element's text: translucent layers blended, white at the bottom
    const layers = [];
    for (let at = el; at instanceof Element; at = at.parentElement) {
      const layer = rgba(getComputedStyle(at).backgroundColor);
      if (layer[3] > 0) layers.push(layer);
      if (layer[3] >= 1) break;
    }
    return hex(layers.reverse().reduce((under, [r, g, b, a]) =>
      [r * a + under[0] * (1 - a), g * a + under[1] * (1 - a), b * a + under[2] * (1 - a)], [255, 255, 255]));
  };
  const FAINT = 0.1;  // opacity below which nothing is seen
  const hides = el => {  // whether nothing can be seen through it
    if (['img', 'canvas', 'video', 'iframe', 'input', 'select', 'textarea'].includes(el.localName)) return true;
    const style = getComputedStyle(el);
    if (el instanceof SVGElement && el.localName !== 'svg' ? rgba(style.fill)[3] < 1 : rgba(style.backgroundColor)[3] < 1)
      return false;
    for (let at = el; at instanceof Element; at = at.parentElement) if (+getComputedStyle(at).opacity < 1) return false;
    return true;
  };
  const unseen = (style, el, rect) => {  // whether text at that place has no colour, or that of what it stands on
    const fill = el instanceof SVGElement ? style.fill : style.webkitTextFillColor;
    const lined = el instanceof SVGElement ? style.stroke !== 'none' : parseFloat(style.webkitTextStrokeWidth) > 0;
    if (lined || style.textShadow !== 'none' || fill.startsWith('url')) return false;
    const ink = fill === 'none' ? [0, 0, 0, 0] : rgba(fill);
    const lies = rgba(background(el)), apart = Math.max(...[0, 1, 2].map(n => Math.abs(ink[n] - lies[n]) * ink[3]));
    if (ink[3] >= FAINT && apart > 2) return false;
    for (let at = el; at instanceof Element; at = at.parentElement)  // letters cut out of a picture
      if (getComputedStyle(at).webkitBackgroundClip === 'text') return false;
    if (ink[3] < FAINT) return true;
    for (const hit of document.elementsFromPoint((rect.left + rect.right) / 2, (rect.top + rect.bottom) / 2)) {
      if (getComputedStyle(hit).backgroundImage !== 'none') return false;  // what it stands on is not known
      if (hides(hit)) return hit === el || hit.contains(el);
    }
    return true;
  };
  const reader = document.createRange(), hushed = new Map();
  const silent = el => {  // whether its own text cannot be seen
    if (!hushed.has(el)) {
      const style = getComputedStyle(el);
      hushed.set(el, [...el.childNodes].some(node => {
        if (node.nodeType !== 3 || !node.data.trim()) return false;
        reader.selectNodeContents(node);
        return unseen(style, el, reader.getClientRects()[0] || el.getBoundingClientRect());
      }));
    }
    return hushed.get(el);
  };
  const read = el => {  // its name, without what cannot be seen of it; null where nothing is left
    if (['input', 'select', 'textarea', 'img'].includes(el.localName)) return name(el);
    const nodes = [], walker = document.createTreeWalker(el, NodeFilter.SHOW_TEXT);
    for (let node = walker.nextNode(); node; node = walker.nextNode()) if (node.data.trim()) nodes.push(node);
    if (!nodes.some(node => silent(node.parentElement))) return name(el);
    return clean(nodes.filter(node => !silent(node.parentElement)).map(node => node.data).join(' ')) || null;
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
  const written = el => el.type === 'password' ? '\u2022'.repeat(el.value.length) : String(el.value);  // as it is seen
  const clip = rect => [Math.max(0, Math.floor(rect.left)), Math.max(0, Math.floor(rect.top)),
    Math.min(width, Math.ceil(rect.right)), Math.min(height, Math.ceil(rect.bottom))];
  const dense = devicePixelRatio, across = Math.round(width * dense), down = Math.round(height * dense);
  const pixels = rect => [Math.max(0, Math.floor(rect.left * dense)), Math.max(0, Math.floor(rect.top * dense)),
    Math.min(across, Math.ceil(rect.right * dense)), Math.min(down, Math.ceil(rect.bottom * dense))];  // of the picture
  const COLUMNS = [0.5, 0.3, 0.7, 0.12, 0.88], ROWS = [0.5, 0.2, 0.8];

  // Paint order (CSS 2.2, appendix E): every element gets a key of (layer, order) pairs that compare like the drawing.
  // ``sc`` is the key of its stacking context, ``base`` that of what else is drawn as one piece around it.
  let order = 0;
  const place = (el, style, above, parent) => {
    const mine = ++order, index = style.zIndex;
    const item = parent && /flex|grid/.test(parent.display);
    const positioned = style.position !== 'static';
    const layered = (positioned || item) && index !== 'auto';
    const makes = layered || /fixed|sticky/.test(style.position) || +style.opacity < 1 || style.transform !== 'none' ||
      style.filter !== 'none' || style.isolation === 'isolate' || style.mixBlendMode !== 'normal';
    const top = el.matches(':modal, :popover-open');
    if (top || makes || positioned) {
      const z = layered ? +index : 0;
      const key = top ? [1e9, mine] : [...above.sc, z < 0 ? z : 1 + z, mine];
      return {key, sc: top || makes ? key : above.sc, base: key};
    }
    const layer = style.float !== 'none' ? 0.3 : item || style.display.startsWith('inline') ? 0.6 : 0;
    const key = [...above.base, layer, mine];
    const whole = layer === 0.3 || item || style.display.startsWith('inline-');
    return {key, sc: above.sc, base: whole ? key : above.base};
  };
  const before = (a, b) => {
    for (let n = 0; n < Math.min(a.length, b.length); n++) if (a[n] !== b[n]) return a[n] - b[n];
    return a.length - b.length;
  };

  const GROUPS = {form: 'form', dialog: 'dialog', table: 'table', tr: 'row', li: 'row', article: 'card',
    section: 'section', fieldset: 'section', aside: 'side panel', nav: 'navigation', menu: 'menu'};
  const group = el => {
    const given = {dialog: 'dialog', alertdialog: 'dialog', form: 'form', menu: 'menu', row: 'row'};
    const kind = given[el.getAttribute('role')] || GROUPS[el.localName];
    if (!kind) return null;
    const title = el.querySelector('h1, h2, h3, h4, legend, caption, b, td, th');
    const label = kind === 'row' ? title || el.querySelector('a, span') : title;
    return {role: kind, name: label && label.innerText ? clean(label.innerText) : '', box: pixels(el.getBoundingClientRect()),
      members: []};
  };

  const elements = [], groups = [], sources = [], keys = [], open = [];
  let unreached = false;  // something that the mouse passes through
  const walk = (el, above, parent, left = 1) => {
    const style = getComputedStyle(el);
    left *= +style.opacity;
    if (style.display === 'none' || left < FAINT) return;
    const placed = place(el, style, above, parent);
    if (style.pointerEvents === 'none') unreached = true;
    if (elements.length < most && style.visibility === 'visible') look(el, style, placed.key);
    if (el.getAttribute('role') === 'img') return;  // one picture, whatever it is made of
    const own = group(el);
    if (own) open.push(own);
    for (const child of el.children) walk(child, placed, style, left);
    if (own) {
      open.pop();
      if (own.members.length) groups.push(own);
    }
  };
  const range = document.createRange();
  const frames = new Map();
  const hiding = el => {  // the boxes that hide what reaches over their borders: [rect, across, down]
    if (!(el instanceof Element) || el === document.body || el === document.documentElement) return [];
    if (!frames.has(el)) {
      const style = getComputedStyle(el), across = style.overflowX !== 'visible', down = style.overflowY !== 'visible';
      const hides = (across || down) && !/^(inline|contents)$/.test(style.display) && !(el instanceof SVGElement);
      frames.set(el, [...(hides ? [[el.getBoundingClientRect(), across, down]] : []), ...hiding(el.parentElement)]);
    }
    return frames.get(el);
  };
  const clipped = (rect, el) => {  // whether one of them, or the screen's border, cuts into a line's letters
    const edge = 0.2 * (rect.bottom - rect.top);  // room above and below the letters
    if (rect.left < -1 || rect.top < -edge || rect.right > width + 1 || rect.bottom > height + edge) return true;
    return hiding(el).some(([box, across, down]) => across && (rect.left < box.left - 1 || rect.right > box.right + 1) ||
      down && (rect.top < box.top - edge || rect.bottom > box.bottom + edge));
  };
  const inner = (style, side) => parseFloat(style[`border${side}Width`]) + parseFloat(style[`padding${side}`]);
  const length = (text, style) => {
    paint.font = `${style.fontStyle} ${style.fontWeight} ${style.fontSize} ${style.fontFamily}`;
    return paint.measureText(text).width;
  };
  const room = (el, style) => el.getBoundingClientRect().width - inner(style, 'Left') - inner(style, 'Right');
  const cut = (el, style) => {  // whether some of its text, or of what is written in it, does not show
    if (['input', 'textarea'].includes(el.localName))
      return el.scrollWidth > el.clientWidth + 1 || el.scrollHeight > el.clientHeight + 1;
    if (el.localName === 'select') return length(name(el), style) > room(el, style);
    const walker = document.createTreeWalker(el, NodeFilter.SHOW_TEXT);
    for (let node = walker.nextNode(); node; node = walker.nextNode()) {
      if (!node.data.trim()) continue;
      range.selectNodeContents(node);
      if ([...range.getClientRects()].some(rect => rect.width > 1 && clipped(rect, node.parentElement))) return true;
    }
    return false;
  };
  const look = (el, style, key) => {
    const kind = role(el, style);
    if (!kind) return;
    const said = read(el);
    if (said === null && ['text', 'label', 'heading', 'link'].includes(kind)) return;
    const rect = el.getBoundingClientRect(), box = clip(rect);
    const part = Math.min(1, (box[2] - box[0]) * (box[3] - box[1]) / (rect.width * rect.height));  // on the screen
    if (box[2] - box[0] < 2 || box[3] - box[1] < 2) return;
    const pieces = [...el.getClientRects()].map(clip).filter(([x1, y1, x2, y2]) => x2 - x1 > 1 && y2 - y1 > 1);
    const [x1, y1, x2, y2] = pieces[0] || box;  // a link broken over two lines is clicked on its first
    let seen = 0, point = null;
    for (const row of ROWS) for (const column of COLUMNS) {
      const x = Math.floor(x1 + (x2 - x1) * column) + 0.5, y = Math.floor(y1 + (y2 - y1) * row) + 0.5;
      const hit = document.elementFromPoint(x, y);
      if (!hit || !(hit === el || el.contains(hit))) continue;
      seen += 1;
      point = point || [x * dense, y * dense];
    }
    if (!seen) return;
    const svg = el instanceof SVGElement, form = 'disabled' in el;
    const aria = el.getAttribute('aria-checked') || el.getAttribute('aria-selected');
    elements.push({
      box: pixels(rect), text: (said || '').slice(0, 200), role: kind, tag: el.localName, color: hex(rgba(svg ? style.fill : style.color)),
      background: background(svg ? el.parentElement : el), visible: part * seen / (ROWS.length * COLUMNS.length), point,
      value: 'value' in el && kind !== 'button' && kind !== 'listitem' && !unseen(style, el, rect) ? written(el).slice(0, 200) : '',
      checked: kind === 'checkbox' || kind === 'radio' ? !!el.checked || aria === 'true' : aria ? aria === 'true' : null,
      enabled: !(form && el.disabled), focused: document.activeElement === el, z: 0, shown: 0,
      cut: cut(el, style),
    });
    for (const each of open) each.members.push(elements.length - 1);
    sources.push([el, x1, y1, x2, y2, part]);
    keys.push(key);
  };
  walk(root, {sc: [], base: []}, null);
  keys.map((key, n) => [key, n]).sort((a, b) => before(a[0], b[0])).forEach(([, n], rank) => { elements[n].z = rank; });

  const everything = new CSSStyleSheet();
  if (unreached) {  // eyes see what the mouse passes through
    everything.replaceSync('* { pointer-events: auto !important }');
    document.adoptedStyleSheets = [...document.adoptedStyleSheets, everything];
  }
  sources.forEach(([el, x1, y1, x2, y2, part], n) => {
    if (!unreached && elements[n].visible === 1) { elements[n].shown = 1; return; }
    let seen = 0;
    for (const row of ROWS) for (const column of COLUMNS) {
      const x = Math.floor(x1 + (x2 - x1) * column) + 0.5, y = Math.floor(y1 + (y2 - y1) * row) + 0.5;
      for (const hit of document.elementsFromPoint(x, y)) {
        if (hit === el || el.contains(hit)) { seen += 1; break; }
        if (hides(hit)) break;
      }
    }
    elements[n].shown = part * seen / (ROWS.length * COLUMNS.length);
  });
  if (unreached) document.adoptedStyleSheets = document.adoptedStyleSheets.filter(sheet => sheet !== everything);

  const unread = [], lines = [];
  const missed = rect => {
    const box = clip(rect);
    if (box[2] - box[0] > 1 && box[3] - box[1] > 1) unread.push(pixels(rect));
  };
  const faded = el => {  // whether nobody would see it
    let left = 1;
    for (let at = el; at instanceof Element; at = at.parentElement) left *= +getComputedStyle(at).opacity;
    return left < FAINT;
  };
  const drawn = (words, rect, parent, style, accept) => {
    const [x1, y1, x2, y2] = clip(rect);
    if (x2 - x1 <= 1 || y2 - y1 <= 1 || unseen(style, parent, rect)) return;
    const whole = rect.left >= -0.5 && rect.top >= -0.5 && rect.right <= width + 0.5 && rect.bottom <= height + 0.5;
    const clear = whole && !clipped(rect, parent) && [0.05, 0.5, 0.95].every(part => {
      const hit = document.elementFromPoint(x1 + (x2 - x1) * part, (y1 + y2) / 2);
      return hit && accept(hit);
    });
    if (clear && lines.length < most)
      lines.push({box: pixels(rect), text: words, background: background(parent), size: parseFloat(style.fontSize) * dense,
        color: hex(rgba(parent instanceof SVGElement ? style.fill : style.color))});
    else unread.push(pixels(rect));
  };
  const field = el => {  // what is written in a text field or shown of a choice, which is in no text node
    const style = getComputedStyle(el);
    if (style.visibility !== 'visible' || faded(el)) return;
    const choice = el.localName === 'select', text = choice ? el.selectedOptions[0] && el.selectedOptions[0].text :
      el.value || el.placeholder;
    if (!clean(text)) return;
    const rect = el.getBoundingClientRect(), size = parseFloat(style.fontSize), long = length(text, style);
    if (long > room(el, style) || el.localName === 'textarea' || !/^(start|left|-webkit-auto)$/.test(style.textAlign)) {
      missed(rect);
      return;
    }
    const left = rect.left + inner(style, 'Left') + (choice ? 4 : 0), middle = (rect.top + rect.bottom) / 2;
    const box = {left, right: left + long, top: middle - size * 0.6, bottom: middle + size * 0.6};
    const shown = el.value || choice ? style : getComputedStyle(el, '::placeholder');
    drawn(clean(text), box, el, shown, hit => hit === el);
  };
  const WIDE = '\\u3000-\\u303f\\u3040-\\u30ff\\u3400-\\u9fff\\uf900-\\ufaff\\uff00-\\uffef';  // written without spaces
  const WORD = new RegExp(`[${WIDE}]|[^\\s${WIDE}]+`, 'g');
  const nodes = document.createTreeWalker(root, NodeFilter.SHOW_TEXT | NodeFilter.SHOW_ELEMENT);
  for (let node = nodes.nextNode(); node && lines.length < most; node = nodes.nextNode()) {
    if (node.nodeType === 1) {
      const types = ['text', 'email', 'search', 'tel', 'url', 'number', 'date', 'time'];
      if (node.localName === 'input' ? types.includes(node.type) : ['select', 'textarea'].includes(node.localName))
        field(node);
      continue;
    }
    const parent = node.parentElement;
    if (!node.data.trim() || ['SCRIPT', 'STYLE', 'OPTION', 'NOSCRIPT', 'TEXTAREA'].includes(parent.tagName)) continue;
    const style = getComputedStyle(parent);
    if (style.visibility !== 'visible' || faded(parent)) continue;
    let line = null, end = 0;
    const finish = () => {
      const accept = hit => hit === parent || parent.contains(hit) || hit.contains(parent) && root.contains(hit) && hit !== root;
      if (line) drawn(line.text, line, parent, style, accept);
      line = null;
    };
    for (const word of node.data.matchAll(WORD)) {
      range.setStart(node, word.index);
      range.setEnd(node, word.index + word[0].length);
      const apart = word.index > end ? ' ' : '';
      end = word.index + word[0].length;
      const rects = range.getClientRects();
      if (rects.length !== 1) {  // not drawn, or broken inside a word
        finish();
        for (const rect of rects) if (!unseen(style, parent, rect)) missed(rect);
        continue;
      }
      const rect = rects[0];
      const shown = style.textTransform === 'uppercase' ? word[0].toUpperCase() :
        style.textTransform === 'lowercase' ? word[0].toLowerCase() :
        style.textTransform === 'capitalize' ? word[0][0].toUpperCase() + word[0].slice(1) : word[0];
      if (line && Math.abs(rect.top - line.top) < 2 && rect.left >= line.right - 1) {
        line.text += apart + shown;
        line.right = rect.right;
        line.bottom = Math.max(line.bottom, rect.bottom);
      } else {
        finish();
        line = {text: shown, left: rect.left, top: rect.top, right: rect.right, bottom: rect.bottom};
      }
    }
    finish();
  }
  return {elements, groups, lines, unread};
}
