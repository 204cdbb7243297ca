// A shop: products to search and sort, a basket, a list of wishes, orders.
const PAGE = 6;
const nav = () => button('Shop', 'go|home') + button('Wishes', 'go|wishes') +
  button(`Basket (${Object.values(site.db.basket).reduce((a, b) => a + b, 0)})`, 'go|basket') + button('Orders', 'go|orders');
const stars = n => '★'.repeat(n) + '☆'.repeat(5 - n);
const chosen = () => {
  const {q = '', category = '', sort = ''} = site.notes;
  const rows = site.db.products.filter(p => (!category || p.category === category) && p.name.toLowerCase().includes(q.toLowerCase()));
  const by = {'Name': (a, b) => (a.name < b.name ? -1 : 1), 'Price': (a, b) => a.price - b.price, 'Rating': (a, b) => b.rating - a.rating};
  return rows.sort(by[sort || 'Name']);
};
views.home = () => {
  const {q = '', category = '', sort = '', page = 0} = site.notes, rows = chosen();
  const shown = rows.slice(page * PAGE, page * PAGE + PAGE), pages = Math.ceil(rows.length / PAGE);
  return `<form class="inline" data-submit="search"><input name="q" autocomplete="off" placeholder="Search products" value="${esc(q)}"><button>Search</button></form>` +
    `<div class="bar">${['', ...new Set(site.db.products.map(p => p.category))].map(c => button(c || 'All', 'category|' + c, c === category ? 'on' : '')).join('')}</div>` +
    `<div class="bar"><span class="muted">Sort by</span>${['Name', 'Price', 'Rating'].map(s => button(s, 'sort|' + s, s === (sort || 'Name') ? 'on' : '')).join('')}</div>` +
    `<div class="grid">${shown.map(p => `<div class="card">${link(p.name, 'go|product|' + p.id)}<p>${money(p.price)} <span class="muted">${stars(p.rating)}</span></p>` +
      `<span class="muted">${esc(p.category)}</span></div>`).join('') || '<p>Nothing found.</p>'}</div>` +
    `<div class="bar">${Array.from({length: pages > 1 ? pages : 0}, (_, n) => button(n + 1, 'page|' + n, n === page ? 'on' : '')).join('')}</div>`;
};
views.product = ({id}) => {
  const p = find(site.db.products, id);
  return `<h2>${esc(p.name)}</h2><p>${money(p.price)} · ${stars(p.rating)} · ${esc(p.category)}</p><p>${esc(p.text)}</p>` +
    form('add|' + id, field('count', 'Pieces', '1'), 'Add to basket') +
    `<p>${site.db.wishes.includes(+id) ? button('Remove from wishes', 'unwish|' + id) : button('Add to wishes', 'wish|' + id)}</p>`;
};
views.wishes = () => '<h2>Wishes</h2>' + (site.db.wishes.map(id => `<div class="row"><span>${link(find(site.db.products, id).name, 'go|product|' + id)}</span>` +
  button('Remove', 'unwish|' + id) + '</div>').join('') || '<p>None yet.</p>');
const lines = (basket, edit) => Object.entries(basket).map(([id, count]) => {
  const p = find(site.db.products, id);
  return `<div class="row"><span>${esc(p.name)}</span><span>${count} × ${money(p.price)}</span>` +
    (edit ? button('−', 'less|' + id) + button('+', 'more|' + id) + button('Remove', 'drop|' + id) : '') + '</div>';
}).join('');
views.basket = () => '<h2>Basket</h2>' + (lines(site.db.basket, true) || '<p>It is empty.</p>') +
  (Object.keys(site.db.basket).length ? `<p>Sum: ${money(Object.entries(site.db.basket).reduce((sum, [id, n]) => sum + n * find(site.db.products, id).price, 0))}</p>` +
    button('Checkout', 'go|checkout', 'main') : '');
views.checkout = () => '<h2>Checkout</h2>' + form('order', field('name', 'Name') + field('address', 'Address') +
  choice('delivery', 'Delivery', ['Standard', 'Express', 'Pick-up'], 'Standard'), 'Place order');
views.orders = () => '<h2>Orders</h2>' + (site.db.orders.map(o => `<div class="card"><b>Order ${o.id}</b> <span class="muted">${esc(o.delivery)} to ${esc(o.name)}, ${esc(o.address)} · ${esc(o.state)}</span>` +
  lines(o.lines, false) + (o.state === 'open' ? button('Cancel order ' + o.id, 'cancel|' + o.id) : '') + '</div>').join('') || '<p>None yet.</p>');
deeds.search = ({q}) => { site.notes = {...site.notes, q, page: 0}; draw(); };
deeds.category = category => { site.notes = {...site.notes, category, page: 0}; draw(); };
deeds.sort = sort => { site.notes = {...site.notes, sort, page: 0}; draw(); };
deeds.page = page => { site.notes.page = +page; draw(); };
deeds.add = ({count}, id) => {
  if (!/^[1-9][0-9]?$/.test(count)) say('Pieces must be a number from 1 to 99.');
  else {
    site.db.basket[id] = (site.db.basket[id] || 0) + +count;
    say('Added to the basket.');
  }
  draw();
};
deeds.wish = id => { site.db.wishes.push(+id); site.db.wishes.sort((a, b) => a - b); draw(); };
deeds.unwish = id => { site.db.wishes = site.db.wishes.filter(w => w !== +id); draw(); };
deeds.more = id => { site.db.basket[id] += 1; draw(); };
deeds.less = id => { if ((site.db.basket[id] -= 1) === 0) delete site.db.basket[id]; draw(); };
deeds.drop = id => { delete site.db.basket[id]; draw(); };
deeds.order = ({name, address, delivery}) => {
  if (!name || !address) { say('Name and address are needed.'); draw(); return; }
  const id = next(site.db.orders);
  site.db.orders.push({id, name, address, delivery, state: 'open', lines: site.db.basket});
  site.db.basket = {};
  say(`Order ${id} is placed.`);
  go('orders');
};
deeds.cancel = id => { find(site.db.orders, id).state = 'cancelled'; draw(); };
