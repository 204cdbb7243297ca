// One expert per MiniWoB++ task: from the document to the next action, or null when nothing is left to do.
// A function expression: (task, utterance) => {kind, ...} in screen pixels; see experts.py.
(() => {
  const one = (selector, root = document) => root.querySelector(selector);
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const words = el => el.textContent.replace(/\s+/g, ' ').trim();
  const quoted = text => [...text.matchAll(/"([^"]*)"/g)].map(match => match[1]);
  const numbers = text => [...text.matchAll(/-?\d+/g)].map(match => +match[0]);
  const ORDER = {'1st': 0, '2nd': 1, '3rd': 2};

  // a pixel of el that a click would reach: other things may cover its middle
  const reach = el => {
    for (const rect of [...el.getClientRects(), el.getBoundingClientRect()]) {
      let best = null, nearest = Infinity;
      const across = Math.max(1, Math.floor(rect.width / 12)), down = Math.max(1, Math.floor(rect.height / 12));
      for (let y = Math.floor(rect.top); y < rect.bottom; y += down)
        for (let x = Math.floor(rect.left); x < rect.right; x += across) {
          const hit = document.elementFromPoint(x + 0.5, y + 0.5);
          if (!hit || !(hit === el || el.contains(hit))) continue;
          const distance = Math.hypot(x + 0.5 - (rect.left + rect.right) / 2, y + 0.5 - (rect.top + rect.bottom) / 2);
          if (distance < nearest) [best, nearest] = [[x + 0.5, y + 0.5], distance];
        }
      if (best) return best;
    }
    return null;
  };
  const at = (x, y) => ({kind: 'click', x, y});
  const click = el => {
    const point = el && reach(el);
    return point && at(...point);
  };
  const key = name => ({kind: 'key', key: name});
  const hotkey = keys => ({kind: 'hotkey', keys});
  const drag = (from, to) => ({kind: 'drag', x1: from[0], y1: from[1], x2: to[0], y2: to[1]});
  const withText = (selector, text) => all(selector).find(el => words(el) === text && reach(el));
  // put text into a field, one action at a time; null once it is there
  const fill = (field, text) => {
    if (field.value === text) return null;
    if (document.activeElement !== field) return click(field);
    const whole = field.type === 'number' ? mmagent.memory.selected === field.value :
      field.selectionStart === 0 && field.selectionEnd === field.value.length;
    mmagent.memory.selected = field.value;  // a number field does not tell what is selected
    return field.value && !whole ? hotkey('ctrl+a') : {kind: 'type', text};
  };
  const submit = () => click(one('#subbtn') || one('#submit') || one('#area button.secondary-action'));
  const slide = (slider, goal) => {  // near it with the mouse, then to it with the keys
    const value = jQuery(slider).slider('value');
    if (value === goal) return null;
    const {min, max, orientation} = jQuery(slider).slider('option');
    const handle = one('.ui-slider-handle', slider), rect = slider.getBoundingClientRect();
    const inside = (v, low, high) => Math.min(Math.max(v, low + 1), high - 1);
    const part = (goal - min) / (max - min), flat = orientation === 'horizontal';
    const x = inside(rect.left + (flat ? part : 0.5) * rect.width, rect.left, rect.right);
    const y = inside(rect.bottom - (flat ? 0.5 : part) * rect.height, rect.top, rect.bottom);
    const grip = handle.getBoundingClientRect();  // pressing it where it is moves nothing
    const held = x > grip.left - 1 && x < grip.right + 1 && y > grip.top - 1 && y < grip.bottom + 1;
    if (document.activeElement !== handle) return held ? click(handle) : at(x, y);
    if (held || Math.abs(value - goal) <= 3) return key(value < goal ? 'ArrowRight' : 'ArrowLeft');
    return at(x, y);
  };
  const figures = root => all('rect, circle, polygon, text', root).map(el => {
    const tag = el.localName, letter = tag === 'text' ? el.textContent : null;
    const side = tag === 'text' ? parseFloat(el.getAttribute('font-size')) : el.getBBox().width;
    return {
      el, color: el.getAttribute('fill'), size: side > 15 ? 'large' : 'small',
      type: letter === null ? 'shape' : /\d/.test(letter) ? 'digit' : 'letter',
      text: letter === null ? {rect: 'rectangle', circle: 'circle', polygon: 'triangle'}[tag] : letter,
    };
  });
  const matching = description => {
    const parts = description.split(' '), thing = parts.pop();
    return figures(one('#area_svg')).filter(f => (thing === 'item' || thing === f.text || thing === f.type) &&
      parts.every(part => part === f.size || part === f.color));
  };
  const center = el => [+el.getAttribute('cx'), +el.getAttribute('cy')];
  // the whole pixel of a drawing where the score is highest, then submit
  const place = score => {
    if (one('#blue-circle')) return submit();
    const rect = one('#svg-grid').getBoundingClientRect();
    let best = null, highest = -Infinity;
    for (let x = Math.ceil(rect.left) + 1; x < rect.right - 1; x++)
      for (let y = Math.ceil(rect.top) + 1; y < Math.min(rect.bottom, 176); y++) {
        const value = score(x, y - 50);
        if (value > highest && document.elementFromPoint(x + 0.5, y + 0.5).closest('#svg-grid'))
          [best, highest] = [[x + 0.5, y + 0.5], value];
      }
    return at(...best);
  };
  const angle = (a, b, v) => {
    const d = Math.atan2(a[1] - v[1], a[0] - v[0]) - Math.atan2(b[1] - v[1], b[0] - v[0]);
    return Math.abs(Math.atan2(Math.sin(d), Math.cos(d))) * 180 / Math.PI;
  };
  const checkNamed = (names, boxes) => {
    for (const box of boxes)
      if (box.checked !== names.includes(words(box.parentElement))) return click(box);
    return submit();
  };
  const selected = text => text.replace(/^Select (words similar to )?/, '').replace(/ and click Submit\.$/, '').split(', ');
  const linkBehind = (text, opener) => {  // a link in one of several panels, of which one may be open
    const links = all('span.alink').filter(el => el.textContent === text);
    const open = links.find(el => reach(el));
    if (open) return click(open);
    for (const link of links) {
      const action = click(opener(link));
      if (action) return action;
    }
    return null;
  };
  const tabOf = link => one(`a[href="#${link.closest('#area > div').id}"]`);
  const headerOf = link => link.closest('.ui-accordion-content').previousElementSibling;
  const button = text => click(withText('#area button', quoted(text)[0]));
  const credentials = text => {
    const [user, password] = quoted(text);
    return fill(one('#username'), user) || fill(one('#password'), password) || submit();
  };
  const tableValue = name => words(all('#tab tr').find(row => words(row.children[0]) === name).children[1]);
  const answer = value => fill(one('#math-answer'), String(value)) || submit();

  const experts = {
    'click-test': () => click(one('#subbtn')),
    'click-test-2': () => click(one('#subbtn')),
    'click-test-transfer': text => click(withText('#area button', /button (\w+)/.exec(text)[1])),
    'click-button': button,
    'unicode-test': button,
    'click-button-sequence': () => click(one(buttonsPushed.length ? '#subbtn2' : '#subbtn')),
    'click-dialog': () => click(one('.ui-dialog-titlebar-close')),
    'click-dialog-2': text => quoted(text)[0] === 'x' ? click(one('.ui-dialog-titlebar-close')) :
      click(withText('.ui-dialog-buttonset button', quoted(text)[0])),
    'click-link': text => click(all('span.alink').find(el => el.textContent === quoted(text)[0] && reach(el))),
    'click-color': text => click(one(`#area [data-color="${/on the (\w+)/.exec(text)[1]}"]`)),
    'click-shape': text => click(matching(text.replace(/^Click on an? /, '')).map(f => f.el).find(reach)),
    'click-tab': text => click(withText('#area ul a', /Tab #\d/.exec(text)[0])),
    'click-tab-2': text => linkBehind(quoted(text)[0], tabOf),
    'click-tab-2-medium': text => {
      const goal = quoted(text)[0];
      return click(all('span.alink').find(el => el.textContent === goal && reach(el)) || one('a[href="#tabs-2"]'));
    },
    'click-widget': text => click(all(`[data-type="${quoted(text)[0]}"]`).find(reach)),
    'click-option': text => {
      const box = all('#area input').find(el => words(el.parentElement) === selected(text)[0]);
      return box.checked ? submit() : click(box);
    },
    'click-checkboxes': text => checkNamed(selected(text), all('#area input')),
    'click-checkboxes-soft': text => {
      const group = word => SYNONYMS.findIndex(words => words.includes(word));
      const wanted = selected(text).map(group);
      const names = all('#area label').map(words).filter(name => wanted.includes(group(name)));
      return checkNamed(names, all('#area input'));
    },
    'click-collapsible': () => one('.ui-accordion-content').offsetHeight ? submit() : click(one('.ui-accordion-header')),
    'click-collapsible-2': text => linkBehind(quoted(text)[0], headerOf),
    'click-shades': text => {
      const shade = one(`#area span[data-color="${/shades of (\w+)/.exec(text)[1]}"]:not(.selected)`);
      return shade ? click(shade) : submit();
    },
    'focus-text': () => click(one('#tt')),
    'focus-text-2': text => click(all('#area input')[ORDER[/\d\w\w/.exec(text)[0]]]),
    'grid-coordinate': text => click(document.getElementById(/\(.*\)/.exec(text)[0])),
    'identify-shape': () => {
      const [figure] = figures(one('#area_svg'));
      return click(one(`button[data-type="${figure.type === 'shape' ? figure.text : figure.type}"]`));
    },
    'count-shape': text => click(withText('#count-buttons button',
      String(matching(/^How many (.*)s are there/.exec(text)[1]).length))),
    'circle-center': () => {
      const [cx, cy] = center(one('.black-circle'));
      return place((x, y) => -Math.hypot(x - cx - 0.5, y - cy - 0.5));
    },
    'find-midpoint': () => {
      const [a, b] = all('.black-circle').map(center);
      return place((x, y) => -Math.hypot(x - (a[0] + b[0]) / 2, y - (a[1] + b[1]) / 2));
    },
    'bisect-angle': () => {
      const [a, b] = all('.init-black').map(center), v = center(one('.init-blue'));
      return place((x, y) => Math.hypot(x - v[0], y - v[1]) < 12 ? -1e9 :
        -Math.max(angle(a, [x, y], v), angle(b, [x, y], v)));
    },
    'right-angle': () => {
      const a = center(one('#init-black')), v = center(one('#init-blue'));
      return place((x, y) => Math.hypot(x + 0.5 - v[0], y + 0.5 - v[1]) < 12 ? -1e9 :
        -Math.abs(90 - angle(a, [x + 0.5, y + 0.5], v)));
    },
    'ascending-numbers': () => {
      const first = all('#area_svg text').find(el => el.textContent === '1');
      return click(first || one('#area_svg rect'));
    },
    'enter-text': text => fill(one('#tt'), quoted(text)[0]) || submit(),
    'enter-text-2': text => fill(one('#tt'), /upper case/.test(text) ? quoted(text)[0].toUpperCase() :
      quoted(text)[0].toLowerCase()) || submit(),
    'enter-password': text => fill(one('#password'), quoted(text)[0]) || fill(one('#verify'), quoted(text)[0]) || submit(),
    'login-user': credentials,
    'login-user-popup': text => click(one('#popup-cancel')) || credentials(text),
    'text-transform': () => fill(one('#tt'), words(one('#captcha'))) || submit(),
    'simple-arithmetic': () => {
      const [a, operator, b] = words(one('#math-problem')).split(' ');
      return answer({'+': +a + +b, '-': a - b, 'x': a * b}[operator]);
    },
    'simple-algebra': () => {
      const [left, operator, right, , total] = words(one('#math-problem')).split(' ');
      if (left !== 'x') return answer(operator === '+' ? total - left : left - total);
      return answer(operator === '+' ? total - right : +total + +right);
    },
    'visual-addition': () => answer(all('.addition-block').length),
    'odd-or-even': () => {
      for (const row of all('.row')) {
        const wanted = one(Math.abs(+words(one('.display-number', row))) % 2 ? '.odd' : '.even', row);
        if (!wanted.classList.contains('selected')) return click(wanted);
      }
      return submit();
    },
    'read-table': text => fill(one('#tt'), tableValue(/value of (.*) into the text/.exec(text)[1])) || submit(),
    'read-table-2': () => [1, 2].map(n => fill(one(`#tt${n}`), tableValue(words(one(`#ll${n}`)).replace(/:$/, ''))))
      .find(action => action) || submit(),
    'find-word': text => {
      const word = words(one('#area p')).split(' ')[parseInt(/(\d+)\w\w word/.exec(text)[1]) - 1];
      return fill(one('#answer-input'), word.replace(/[^a-zA-Z]/g, '')) || submit();
    },
    'find-greatest': () => {
      const cards = all('.card'), value = card => +one('.card-value', card).textContent;
      const best = cards.reduce((a, b) => value(b) > value(a) ? b : a);
      return best.classList.contains('hidden') ? click(best) : submit();
    },
    'generate-number': text => {
      const shown = words(one('#display-number')), value = +shown, [limit] = numbers(text);
      const right = shown !== '-' && (/less/.test(text) ? value < limit : /greater/.test(text) ? value > limit :
        value % 2 === (/odd/.test(text) ? 1 : 0));
      return right ? submit() : click(one('#generate'));
    },
    'guess-number': () => {  // bisect between what the answers so far allow
      const range = mmagent.memory.range = mmagent.memory.range || {low: 0, high: 9}, field = one('#tt');
      const lower = one('#lower:not(.hide) span'), higher = one('#higher:not(.hide) span');
      if (lower) range.high = Math.min(range.high, +lower.textContent - 1);
      if (higher) range.low = Math.max(range.low, +higher.textContent + 1);
      return fill(field, String(Math.floor((range.low + range.high) / 2))) || submit();
    },
    'number-checkboxes': text => {
      const pattern = PATTERNS[+quoted(text)[0]].flat(), boxes = all('#checkboxes input');
      const wrong = boxes.find((box, n) => box.checked !== !!pattern[n]);
      return wrong ? click(wrong) : submit();
    },
    'use-slider': text => slide(one('#slider'), numbers(text)[0]) || submit(),
    'use-spinner': text => {
      const value = parseInt(one('#spinner').value), goal = numbers(text)[0];
      if (value === goal) return submit();
      return click(one(value < goal ? '.ui-spinner-up' : '.ui-spinner-down'));
    },
    'form-sequence': text => {
      const box = all('#area input[type=checkbox]')[ORDER[/the (\d\w\w) checkbox/.exec(text)[1]]];
      return slide(one('#slider'), numbers(text)[0]) || (box.checked ? submit() : click(box));
    },
    'form-sequence-2': text => {
      const radio = all('#area input[type=radio]')[ORDER[/the (\d\w\w) radio/.exec(text)[1]]];
      const field = all('#area input[type=text]')[ORDER[/the (\d\w\w) textbox/.exec(text)[1]]];
      return radio.checked ? fill(field, quoted(text)[0]) || submit() : click(radio);
    },
    'multi-orderings': text => {
      const [, genre, name, year] = /Search for (.*) movies directed by (.*) from year (\d+)/.exec(text);
      const wanted = {Genre: genre, Director: name, Year: year};
      for (const row of all('#area tr')) {
        const action = fill(one('input', row), wanted[words(row.children[0])]);
        if (action) return action;
      }
      return click(one('.final'));
    },
    'navigate-tree': text => {
      const goal = all('#tree span').find(el => el.textContent === quoted(text)[0]);
      if (reach(goal)) return click(goal);
      for (let item = goal.closest('ul').closest('li'); item; item = item.parentElement.closest('#tree li')) {
        const name = one(':scope > span', item);
        if (reach(name)) return click(one(':scope > .hitarea', item) || name);
      }
      return null;
    },
    'drag-box': () => {
      const small = one('#draggableSmall').getBoundingClientRect(), large = one('#draggableLarge').getBoundingClientRect();
      const inside = small.left > large.left + 2 && small.right < large.right - 2 && small.top > large.top + 2 &&
        small.bottom < large.bottom - 2;
      if (inside) return submit();
      const from = reach(one('#draggableSmall')) || [small.left + 10, small.top + 10];
      return drag(from, [from[0] + (large.left + large.right - small.left - small.right) / 2,
        from[1] + (large.top + large.bottom - small.top - small.bottom) / 2]);
    },
    'sign-agreement': text => {
      const goal = one(/ "?Cancel"?\.?$|cancel button/.test(text) ? '#cancel' : '#agree');
      if (!quoted(text).length || /cancel button/.test(text)) return click(goal);
      if (one('#name').disabled) {
        const rect = one('#text-area').getBoundingClientRect();
        return {kind: 'scroll', x: (rect.left + rect.right) / 2, y: (rect.top + rect.bottom) / 2, dx: 0, dy: 2000};
      }
      return fill(one('#name'), quoted(text)[0]) || click(goal);
    },
    'phone-book': text => {
      const [, name, property] = /Find (.*) in the contact book and click on their (\w+)/.exec(text);
      if (words(one('#contact .name')) === name) return click(one(`#contact a.${property}`));
      return click(one('#pagination .next a') || one('#pagination .next'));
    },
  };
  const SAME = {
    'click-tab-2-easy': 'click-tab-2', 'click-tab-2-hard': 'click-tab-2',
    'click-checkboxes-large': 'click-checkboxes', 'click-checkboxes-transfer': 'click-checkboxes',
    'click-collapsible-nodelay': 'click-collapsible', 'click-collapsible-2-nodelay': 'click-collapsible-2',
    'enter-text-dynamic': 'enter-text',
  };
  return (task, utterance) => experts[SAME[task] || task](utterance);
})()
