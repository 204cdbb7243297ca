// A wiki: articles with facts and links, search, editing with a history that can be gone back to.
const nav = () => button('Articles', 'go|home') + button('New article', 'go|new');
const linked = text => esc(text).replace(/\[([^\]]+)\]/g, (whole, title) => {
  const a = site.db.articles.find(a => esc(a.title) === title);
  return a ? `<a href="#" data-do="go|article|${a.id}">${title}</a>` : title;
});
views.home = () => `<form class="inline" data-submit="search"><input name="q" autocomplete="off" placeholder="Search articles" value="${esc(site.notes.q || '')}"><button>Search</button></form>` +
  site.db.articles.filter(a => a.title.toLowerCase().includes((site.notes.q || '').toLowerCase())).map(a => `<div class="row"><span>${link(a.title, 'go|article|' + a.id)}</span></div>`).join('');
views.article = ({id}) => {
  const a = find(site.db.articles, id);
  return `<h2>${esc(a.title)}</h2><p>${linked(a.text)}</p>` + Object.entries(a.facts).map(([k, v]) => `<div class="row"><span>${esc(k)}</span><b>${linked(v)}</b></div>`).join('') +
    `<div class="bar">${button('Edit', 'go|edit|' + id)}${button('History', 'go|history|' + id)}</div>`;
};
views.edit = ({id}) => {
  const a = find(site.db.articles, id);
  return `<h2>Edit ${esc(a.title)}</h2>` + form('save|' + id, field('title', 'Title', a.title) +
    Object.entries(a.facts).map(([k, v], n) => field('fact' + n, k, v)).join('') + area('text', 'Text', a.text), 'Save');
};
views.history = ({id}) => {
  const a = find(site.db.articles, id);
  return `<h2>History of ${esc(a.title)}</h2>` + (a.history.map((h, n) => `<div class="row"><span>Version ${n + 1}: ${esc(Object.entries(h.facts).map(([k, v]) => k + ' ' + v).join(', '))}</span>` +
    button('Restore', `restore|${id}|${n}`) + '</div>').join('') || '<p>It was never changed.</p>');
};
views.new = () => '<h2>New article</h2>' + form('make', field('title', 'Title') + area('text', 'Text'), 'Create');
const kept = a => ({title: a.title, text: a.text, facts: a.facts});
deeds.search = ({q}) => { site.notes.q = q; draw(); };
deeds.save = (given, id) => {
  const a = find(site.db.articles, id), before = kept(a);
  if (!given.title) { say('A title is needed.'); draw(); return; }
  a.facts = Object.fromEntries(Object.keys(a.facts).map((k, n) => [k, given['fact' + n]]));
  Object.assign(a, {title: given.title, text: given.text});
  if (JSON.stringify(before) !== JSON.stringify(kept(a))) a.history.push(before);
  go('article', {id});
};
deeds.restore = (id, n) => {
  const a = find(site.db.articles, id), before = kept(a);
  Object.assign(a, a.history[+n]);
  a.history.push(before);
  go('article', {id});
};
deeds.make = ({title, text}) => {
  if (!title || site.db.articles.some(a => a.title === title)) { say('A title that no article has is needed.'); draw(); return; }
  site.db.articles.push({id: next(site.db.articles), title, text, facts: {}, history: []});
  go('article', {id: next(site.db.articles) - 1});
};
