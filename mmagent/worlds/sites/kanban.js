// A board: cards are dragged between columns, opened, given to people, ticked off, made and deleted.
const nav = () => button('Board', 'go|home') + button('New card', 'go|new');
views.home = () => '<div class="board">' + site.db.columns.map((c, n) => `<div class="column" data-column="${n}"><b>${esc(c)}</b>` +
  site.db.cards.filter(k => k.column === n).map(k => `<div class="card" data-card="${k.id}">${link(k.title, 'go|card|' + k.id)}<br><span class="muted">${esc(k.owner)}` +
    (k.steps.length ? ` · ${k.steps.filter(s => s.done).length}/${k.steps.length}` : '') + '</span></div>').join('') + '</div>').join('') + '</div>';
views.card = ({id}) => {
  const k = find(site.db.cards, id);
  return `<h2>${esc(k.title)}</h2><p class="muted">in ${esc(site.db.columns[k.column])} · due on day ${k.due}</p>` +
    k.steps.map((s, n) => `<p>${button(s.done ? '☑' : '☐', `tick|${id}|${n}`)} ${esc(s.text)}</p>`).join('') +
    form('edit|' + id, choice('owner', 'Owner', site.db.people, k.owner) + field('due', 'Due day', k.due), 'Save') + `<p>${button('Delete card', 'remove|' + id)}</p>`;
};
views.new = () => '<h2>New card</h2>' + form('make', field('title', 'Title') + choice('column', 'Column', site.db.columns, site.db.columns[0]) +
  choice('owner', 'Owner', site.db.people, site.db.people[0]) + field('due', 'Due day'), 'Create');
const whole = text => /^[1-9][0-9]?$/.test(text);
deeds.tick = (id, n) => { const s = find(site.db.cards, id).steps[+n]; s.done = !s.done; draw(); };
deeds.edit = ({owner, due}, id) => {
  if (!whole(due)) { say('The due day must be a number.'); draw(); return; }
  Object.assign(find(site.db.cards, id), {owner, due: +due});
  go('home');
};
deeds.make = ({title, column, owner, due}) => {
  if (!title || !whole(due)) { say('A title and a due day are needed.'); draw(); return; }
  site.db.cards.push({id: next(site.db.cards), title, column: site.db.columns.indexOf(column), owner, due: +due, steps: []});
  go('home');
};
deeds.remove = id => { site.db.cards = site.db.cards.filter(k => k.id !== +id); go('home'); };
let held = null;
document.addEventListener('mousedown', event => {
  const card = event.target.closest('.card[data-card]');
  if (!card || event.target.closest('a')) return;
  held = card;
  event.preventDefault();
});
document.addEventListener('mousemove', () => { if (held) held.classList.add('held'); });
document.addEventListener('mouseup', event => {
  if (!held) return;
  const over = document.elementFromPoint(event.clientX, event.clientY), column = over && over.closest('[data-column]');
  if (column && held.classList.contains('held')) find(site.db.cards, held.dataset.card).column = +column.dataset.column;
  held = null;
  draw();
});
