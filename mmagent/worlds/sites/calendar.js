// A calendar of one month: days, events, a form for both new and old ones.
const HOURS = Array.from({length: 11}, (_, n) => n + 8);
const clock = hour => String(hour).padStart(2, '0') + ':00';
const nav = () => button('Month', 'go|home') + button('List', 'go|list') + button('New event', 'go|new');
const ordered = () => [...site.db.events].sort((a, b) => a.day - b.day || a.hour - b.hour);
views.home = () => `<h2>${esc(site.db.month)}</h2><div class="month">` + Array.from({length: 28}, (_, n) => n + 1).map(day =>
  `<div class="day" data-do="go|day|${day}">${day}${ordered().filter(e => e.day === day).slice(0, 3).map(e => `<div>${e.hour} ${esc(e.title)}</div>`).join('')}</div>`).join('') + '</div>';
const row = e => `<div class="row"><span>${link(e.title, 'go|event|' + e.id)}</span><span class="muted">${clock(e.hour)}–${clock(e.hour + e.length)} · ${esc(e.place)}</span></div>`;
views.day = ({id}) => `<h2>${id} ${esc(site.db.month)}</h2>` + (ordered().filter(e => e.day === +id).map(row).join('') || '<p>Nothing.</p>') + button('Add on this day', 'go|new|' + id);
views.list = () => `<form class="inline" data-submit="search"><input name="q" autocomplete="off" placeholder="Search events" value="${esc(site.notes.q || '')}"><button>Search</button></form>` +
  ordered().filter(e => e.title.toLowerCase().includes((site.notes.q || '').toLowerCase())).map(e => `<p class="muted">${e.day} ${esc(site.db.month)}</p>` + row(e)).join('');
const blank = day => ({title: '', day: day || '', hour: 9, length: 1, place: ''});
const fields = e => field('title', 'Title', e.title) + field('day', 'Day (1-28)', e.day) + choice('hour', 'Begins at', HOURS, e.hour) +
  choice('length', 'Hours', [1, 2, 3], e.length) + field('place', 'Place', e.place);
views.new = ({id}) => '<h2>New event</h2>' + form('save', fields(blank(id)), 'Save');
views.event = ({id}) => '<h2>Event</h2>' + form('save|' + id, fields(find(site.db.events, id)), 'Save') + `<p>${button('Delete event', 'remove|' + id)}</p>`;
deeds.search = ({q}) => { site.notes.q = q; draw(); };
deeds.save = (given, id) => {
  const day = +given.day;
  if (!given.title || !(Number.isInteger(day) && day >= 1 && day <= 28)) { say('A title and a day from 1 to 28 are needed.'); draw(); return; }
  const made = {id: id ? +id : next(site.db.events), title: given.title, day, hour: +given.hour, length: +given.length, place: given.place};
  site.db.events = id ? site.db.events.map(e => e.id === +id ? made : e) : [...site.db.events, made];
  say('Saved.');
  go('day', {id: day});
};
deeds.remove = id => { site.db.events = site.db.events.filter(e => e.id !== +id); say('Deleted.'); go('home'); };
