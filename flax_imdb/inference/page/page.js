// What is typed is asked about: soon for its probability, and after a pause for
// its words. Texts reach the page as textContent alone.

const PREDICT_MS = 100, EXPLAIN_MS = 450;
const LEAST = 0.1, STRONGEST = 5;  // as in inference/highlight.py
const MOST_LETTERS = 40;  // of a word that is told of

const EXAMPLES = [
  'Two hours of people whispering in corridors, and I would not have missed a ' +
    'minute. The last scene is still with me.',
  'I wanted to love it, but I was bored. The effects are wonderful and the ' +
    'story is nowhere to be seen.',
  'It is not the disaster that everybody says. It is not good either, but my ' +
    'children laughed, and so did I, twice.',
  'A masterpiece, they said. A masterclass in wasting a great cast, I say.',
];

const find = id => document.getElementById(id);
const review = find('review');
let labels = [];
let words = [];  // {begin, end, score}, in UTF-16 units of the review
let asked = '';  // the text that `words` are of
let newest = new AbortController();
let timers = [];

function make(name, text, ...classes) {
  const element = document.createElement(name);
  element.textContent = text;
  element.classList.add(...classes);
  return element;
}

function percent(probability) {
  const value = 100 * probability;
  if (value > 99.9) return '> 99.9 %';  // no answer is certain
  if (value < 0.1) return '< 0.1 %';
  return `${value.toFixed(value > 99 || value < 1 ? 1 : 0)} %`;
}

function showWords() {
  const text = review.value, marks = find('marks');
  const most = Math.max(...words.map(word => Math.abs(word.score)), 0);
  const parts = [];
  let done = 0;
  for (const {begin, end, score} of words) {
    const share = Math.abs(score) / most;
    if (!(share >= LEAST)) continue;
    const mark = make('mark', text.slice(begin, end),
                      score > 0 ? 'for' : 'against');
    mark.style.setProperty('--share', share.toFixed(2));
    parts.push(text.slice(done, begin), mark);
    done = end;
  }
  // A line that is empty has its height only if something stands on it.
  marks.replaceChildren(...parts, text.slice(done) + '\u200b');
}

function keepWords() {
  // Words before and after what was changed stay as they are until the answer.
  const now = review.value, most = Math.min(now.length, asked.length);
  let head = 0, tail = 0;
  while (head < most && now[head] === asked[head]) head++;
  while (tail < most - head &&
         now[now.length - 1 - tail] === asked[asked.length - 1 - tail]) tail++;
  const moved = now.length - asked.length;
  words = words.flatMap(word =>
    word.end <= head ? [word] :
    word.begin >= asked.length - tail ?
      [{...word, begin: word.begin + moved, end: word.end + moved}] : []);
  asked = now;
}

function setWords(text, found) {
  // Places are of characters; what lies above U+FFFF has two UTF-16 units.
  const unit = [0];
  for (const character of text) unit.push(unit.at(-1) + character.length);
  words = found.map(([begin, end, score]) =>
    ({begin: unit[begin], end: unit[end], score}));
  asked = text;
}

function showStrongest() {
  const strongest = [...words].sort((a, b) =>
    Math.abs(b.score) - Math.abs(a.score)).slice(0, STRONGEST);
  find('words').replaceChildren(...strongest.map(({begin, end, score}) => {
    const item = make('li', '', score > 0 ? 'for' : 'against');
    const sign = score < 0 ? '−' : '+';
    const word = review.value.slice(begin, end);
    item.append(make('bdi', word.length <= MOST_LETTERS ? word :
                     `${word.slice(0, MOST_LETTERS)}…`),
                make('span', sign + Math.abs(score).toFixed(2)));
    return item;
  }));
  find('strongest').hidden = !strongest.length;
}

function showPrediction(prediction) {
  find('label').textContent = prediction.label;
  if (labels.length > 2) {
    find('percent').textContent = percent(prediction.probability);
    const ranked = Object.entries(prediction.probabilities).sort(
      (a, b) => b[1] - a[1]);
    find('classes').replaceChildren(...ranked.map(([label, probability]) => {
      const item = make('li', ''), bar = make('i', '');
      bar.style.setProperty('--at', probability);
      item.append(make('span', label), make('span', percent(probability)), bar);
      return item;
    }));
  } else {
    const second = prediction.probability;
    find('percent').textContent = percent(
      prediction.label === labels[1] ? second : 1 - second);
    find('needle').style.setProperty('--at', second);
  }
  find('classes').hidden = labels.length <= 2;
  find('gauge').hidden = labels.length > 2;
  for (const name of document.querySelectorAll('.explained'))
    name.textContent = labels.length > 2 ? prediction.label : labels[1];
  find('note').textContent = prediction.note ?? '';
}

function clear() {
  words = [];
  find('label').textContent = '–';
  for (const id of ['percent', 'note', 'said']) find(id).textContent = '';
  find('needle').style.removeProperty('--at');
  find('classes').hidden = true;
  showWords();
  showStrongest();
}

function later(milliseconds, explain) {
  timers.push(setTimeout(ask, milliseconds, explain));
}

async function ask(explain) {
  newest.abort();
  newest = new AbortController();
  const {signal} = newest, text = review.value;
  try {
    const response = await fetch('predict', {
      method: 'POST', signal, headers: {'content-type': 'application/json'},
      body: JSON.stringify({text: text.toWellFormed?.() ?? text, explain})});
    const answer = await response.json();
    if (signal.aborted) return;
    if (!response.ok) {
      find('note').textContent = answer.error;
      const seconds = response.headers.get('retry-after');
      if (seconds) later(1000 * seconds, explain);
      return;
    }
    showPrediction(answer);
    if (!explain) return;
    setWords(text, answer.words);
    showWords();
    showStrongest();
    find('said').textContent =
      `${find('label').textContent}, ${find('percent').textContent}`;
  } catch (error) {
    if (signal.aborted) return;
    find('note').textContent = 'The server does not answer; trying again.';
    later(2000, explain);
  }
}

function changed() {
  timers.forEach(clearTimeout);
  timers = [];
  newest.abort();
  keepWords();
  showWords();
  if (!review.value.trim()) return clear();
  later(PREDICT_MS, false);
  later(EXPLAIN_MS, true);
}

async function begin() {
  review.addEventListener('input', changed);
  for (const text of EXAMPLES) {
    const item = make('li', ''), button = make('button', text);
    button.type = 'button';
    button.addEventListener('click', () => {
      review.value = text;
      review.focus({preventScroll: true});
      scrollTo({top: 0});
      changed();
    });
    item.append(button);
    find('choices').append(item);
  }
  try {
    labels = (await (await fetch('healthz')).json()).labels;
  } catch {
    find('note').textContent = 'The server does not answer: load this page again.';
    return;
  }
  find('gauge').hidden = labels.length > 2;
  if (labels.length === 2) {
    find('first').textContent = labels[0];
    find('second').textContent = labels[1];
    for (const name of document.querySelectorAll('.explained'))
      name.textContent = labels[1];
  }
  // They are about films.
  find('examples').hidden = labels.join() !== 'negative,positive';
  changed();  // what a browser kept from before
}

begin();
