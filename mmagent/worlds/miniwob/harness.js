// Installed once into every MiniWoB++ page: starts an episode from a seed, and reads its state.
// A function expression: (task, collect, act) => nothing; defines window.mmagent.
(task, collect, act) => {
  core.EPISODE_MAX_TIME = 2e9;  // milliseconds; longer than any episode, and within what a timer holds
  core.countdownTimer = core.clearTimer = () => {};
  if (window.jQuery) jQuery.fx.off = true;
  const style = document.createElement('style');
  style.textContent = `html { overflow: hidden }
    #sync-task-cover, #reward-display, #click-canvas { display: none !important }
    * { caret-color: transparent !important; transition: none !important; animation: none !important }`;
  document.head.appendChild(style);

  const utterance = () => {
    const given = core.getUtterance();
    return typeof given === 'string' ? given : given.utterance;
  };
  const clear = () => {  // what a page forgets to undo between two episodes
    if (document.activeElement) document.activeElement.blur();
    for (const field of document.querySelectorAll('#area input, #area textarea')) {
      if (field.type === 'checkbox' || field.type === 'radio') field.checked = field.defaultChecked;
      else field.value = field.defaultValue;
    }
    for (const part of document.querySelectorAll('#area, #area *')) part.scrollTop = part.scrollLeft = 0;
  };
  const observe = most => ({utterance: utterance(), found: most ? collect('body', most) : null});
  window.mmagent = {
    task,
    memory: {},  // of the expert, for one episode
    start(seed, most) {
      clear();
      this.memory = {};
      Math.seedrandom(seed);
      core.startEpisodeReal();
      return {...observe(most), ready: this.ready()};
    },
    observe,
    async settle() {  // pictures in style sheets are fetched when first used: a first screen would lack them
      const styles = [...document.querySelectorAll('body *')].map(el => getComputedStyle(el).backgroundImage);
      const urls = new Set(styles.flatMap(value => [...value.matchAll(/url\("([^"]+)"\)/g)].map(match => match[1])));
      await Promise.all([...urls].map(url => new Promise(done => {
        const image = new Image();
        image.onload = image.onerror = done;
        image.src = url;
      })));
    },
    ready: () => WOB_TASK_READY,
    state: () => [WOB_DONE_GLOBAL, WOB_RAW_REWARD_GLOBAL],
    act: () => act(task, utterance()),
  };
}
