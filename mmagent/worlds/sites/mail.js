// Mail: folders, letters to read, answer, star, move and delete, and a form to write one.
const FOLDERS = ['Inbox', 'Archive', 'Sent', 'Trash'];
const nav = () => FOLDERS.map(f => button(f, 'folder|' + f, (site.notes.folder || 'Inbox') === f ? 'on' : '')).join('') + button('Write', 'go|write');
views.home = () => {
  const {folder = 'Inbox', q = ''} = site.notes;
  const rows = site.db.letters.filter(m => m.folder === folder && (m.who + ' ' + m.subject).toLowerCase().includes(q.toLowerCase()));
  return `<form class="inline" data-submit="search"><input name="q" autocomplete="off" placeholder="Search sender or subject" value="${esc(q)}"><button>Search</button></form>` +
    `<h2>${folder}</h2>` + (rows.map(m => `<div class="row"><span>${link(m.subject, 'go|letter|' + m.id)} <span class="muted">${esc(m.who)}</span></span>` +
      button(m.star ? '★' : '☆', 'star|' + m.id) + '</div>').join('') || '<p>Nothing here.</p>');
};
views.letter = ({id}) => {
  const m = find(site.db.letters, id);
  return `<h2>${esc(m.subject)}</h2><p class="muted">${m.folder === 'Sent' ? 'to' : 'from'} ${esc(m.who)} &lt;${esc(m.address)}&gt;</p><p>${esc(m.text)}</p><div class="bar">` +
    button('Reply', 'go|reply|' + id) + button(m.star ? 'Remove star' : 'Star', 'star|' + id) +
    FOLDERS.filter(f => f !== m.folder && f !== 'Sent').map(f => button(f === 'Trash' ? 'Delete' : 'Move to ' + f, `move|${id}|${f}`)).join('') + '</div>';
};
views.write = () => '<h2>New letter</h2>' + form('send', field('to', 'To') + field('subject', 'Subject') + area('text', 'Text'), 'Send');
views.reply = ({id}) => {
  const m = find(site.db.letters, id);
  return '<h2>Reply</h2>' + form('send', field('to', 'To', m.address) + field('subject', 'Subject', 'Re: ' + m.subject) + area('text', 'Text'), 'Send');
};
deeds.folder = folder => { site.notes = {folder}; go('home'); };
deeds.search = ({q}) => { site.notes.q = q; draw(); };
deeds.star = id => { const m = find(site.db.letters, id); m.star = !m.star; draw(); };
deeds.move = (id, folder) => { find(site.db.letters, id).folder = folder; say('Moved to ' + folder + '.'); go('home'); };
deeds.send = ({to, subject, text}) => {
  if (!/^\S+@\S+$/.test(to) || !text) { say('An address and a text are needed.'); draw(); return; }
  const known = site.db.letters.find(m => m.address === to);
  site.db.letters.push({id: next(site.db.letters), folder: 'Sent', who: known ? known.who : to, address: to, subject, text, star: false});
  say('Sent.');
  site.notes = {};
  go('home');
};
