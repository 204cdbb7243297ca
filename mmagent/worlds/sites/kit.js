// What every site shares: its data, its view, one drawing function, and deeds that buttons and forms name.
// `site.db` is what an errand is judged by; what is only looked at is kept in `site.view` and `site.notes`.
const site = {db: DATA, view: {name: 'home'}, notes: {}};
const views = {}, deeds = {};
const $ = s => document.querySelector(s);
const esc = text => String(text).replace(/[&<>"']/g, c => `&#${c.charCodeAt(0)};`);
const money = cents => '$' + (cents / 100).toFixed(2);
const next = rows => rows.reduce((most, row) => Math.max(most, row.id), 0) + 1;
const find = (rows, id) => rows.find(row => row.id === +id);
const button = (label, deed, kind = '') => `<button class="${kind}" data-do="${esc(deed)}">${esc(label)}</button>`;
const link = (label, deed) => `<a href="#" data-do="${esc(deed)}">${esc(label)}</a>`;
const field = (name, label, value = '', hint = '') =>
  `<label class="field"><span>${esc(label)}</span><input name="${name}" autocomplete="off" value="${esc(value)}" placeholder="${esc(hint)}"></label>`;
const area = (name, label, value = '') =>
  `<label class="field"><span>${esc(label)}</span><textarea name="${name}" rows="4">${esc(value)}</textarea></label>`;
const choice = (name, label, options, chosen) => `<div class="field"><span>${esc(label)}</span><div class="options">` +
  options.map(o => `<label class="option"><input type="radio" name="${name}" value="${esc(o)}" ${o == chosen ? 'checked' : ''}>${esc(o)}</label>`).join('') + '</div></div>';
const form = (deed, body, submit) => `<form data-submit="${esc(deed)}">${body}<button class="main">${esc(submit)}</button></form>`;
const draw = () => {
  $('#main').innerHTML = (site.said ? `<p class="said">${esc(site.said)}</p>` : '') + views[site.view.name](site.view);
  $('#nav').innerHTML = nav();
  site.said = '';
};
const go = (name, args = {}) => {
  site.view = {name, ...args};
  draw();
  $('#main').scrollTop = 0;
};
const say = text => { site.said = text; };
deeds.go = (name, ...args) => go(name, args.length ? {id: args[0]} : {});
document.addEventListener('click', event => {
  const at = event.target.closest('[data-do]');
  if (!at) return;
  event.preventDefault();
  const [name, ...args] = at.dataset.do.split('|');
  deeds[name](...args);
});
document.addEventListener('submit', event => {
  event.preventDefault();
  const [name, ...args] = event.target.dataset.submit.split('|');
  const given = Object.fromEntries([...new FormData(event.target)].map(([key, value]) => [key, value.trim()]));
  deeds[name](given, ...args);
});
