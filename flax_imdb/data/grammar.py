"""A seeded grammar that writes film reviews, for machines with no network.

Every review is neutral talk about an invented film with two to six verdicts
strewn in. All verdicts of a review mean the same, its label; but a good word
may be negated, conceded before a `but`, or quoted from someone who was wrong.
So praise and blame use much the same words, and a model has to read them in
order: `benchmarks/bag_of_words.py` says how little the counts alone tell.

Importing this module imports tfds (0.3 s), so `sources` imports it late.
"""

from collections.abc import Iterable, Iterator, Sequence
import itertools
import random
import re

import tensorflow_datasets as tfds

# Words that carry sentiment: negative ones, then positive ones.
_SENTIMENT = {
  'adj': ("""dull, dreadful, awful, tedious, clumsy, lifeless, tiresome, bad,
             feeble, hollow, muddled, painful, stale, shoddy, terrible, dreary,
             bland, boring, ridiculous, horrible, pointless, weak""",
          """superb, wonderful, brilliant, charming, delightful, clever, good,
             gripping, graceful, touching, lovely, fresh, elegant, excellent,
             radiant, witty, splendid, marvellous, inspired, great, strong"""),
  'noun': ('disaster, bore, mess, failure, dud, waste of time, misfire, chore',
           'masterpiece, triumph, delight, gem, treat, success, joy, marvel'),
  'verb': ('drags, fails, disappoints, stumbles, annoys, irritates, grates',
           'sparkles, works, charms, delights, shines, succeeds, enchants'),
  'felt': ('hated, loathed, regretted, resented, disliked, detested, despised',
           'loved, enjoyed, adored, admired, liked, cherished, treasured'),
  'state': ('bored, annoyed, irritated, exasperated, disappointed, let down',
            'moved, thrilled, delighted, enchanted, impressed, swept away'),
  'feel': ('hate, dislike, mock, loathe, dismiss, despise',
           'love, enjoy, praise, adore, cherish, admire'),
}

# Words that carry none, and short rules. `{x}` is drawn from x; `{+x}` must
# mean what the whole means and `{-x}` the opposite. Repetition is a weight:
# with as many negated claims as plain ones the word counts would tell nothing
# at all; more plain claims leave them a mild signal.
_WORDS = {
  'verdict': '{+statement}, {+turn}',
  'clause': '{+claim}, {+claim}, {+feeling}',
  'claim': '{+plain}, {+plain}, {+plain}, {+negated}',
  'title': '"{things} over {town}", "No {things} for {first}", '
           '"{first} and the {things}", "{things} and {things}"',
  'name': '{first} {last}',
  'first': """Odile, Barnaby, Ines, Mirko, Tamsin, Osvaldo, Petra, Lucian, Noor,
    Hedda, Ignatius, Wilhelmina, Anselm, Fergus, Beatrix, Kofi, Yukiko""",
  'last': """Quillfeather, Marrable, Thistlewick, Pomfroy, Ottersby, Haldoren,
    Brambleday, Kettlewhist, Okonwara, Lindqvarn, Szemborsk, Tanakuro""",
  'town': """Marrowby, Little Pellow, Gransund, Port Almery, Upper Snodding,
    Velisk, Santa Brunia, Hockerfell, Brindle Bay, Kestrelmouth, Cape Thimble,
    Zubrovnia, Nettlecombe Sands, Ostrelia Minor, Old Tarn""",
  'things': """Teapots, Trombones, Geese, Ladders, Umbrellas, Lanterns, Hats,
    Tortoises, Suitcases, Turnips, Candles, Postmen, Pickles, Accordions""",
  'job': """baker, tailor, beekeeper, clockmaker, librarian, judge, plumber,
    dentist, gardener, cartographer, violinist, postman, magician, sailor""",
  'thing': """umbrella, teapot, trombone, telescope, suitcase, ladder, wig, map,
    compass, lantern, cuckoo clock, barometer, wheelbarrow, snow globe""",
  'animal': """goat, goose, parrot, otter, donkey, walrus, greyhound, mule,
    hedgehog, peacock, tortoise, ferret, camel, rooster, heron, llama""",
  'genre': 'crime, science-fiction, pirate, ghost, wedding, courtroom, spy',
  'place': """fish market, railway station, opera house, ice rink, harbour, zoo,
    vineyard, town hall, cheese factory, monastery, ballroom, salt mine""",
  'room': 'kitchen, attic, cellar, pantry, library, greenhouse, barn, corridor',
  'vehicle': """tram, bicycle, rowing boat, hot-air balloon, tractor, sledge,
    milk cart, sleeper train, tricycle, fishing boat, borrowed taxi""",
  'number': 'two, three, four, five, six, seven, nine, eleven, twelve, twenty',
  'food': """popcorn, liquorice, peanuts, pickled eggs, gingerbread, toffee,
    cold noodles, sandwiches, pears, pancakes, dumplings, lemon cake, soup""",
  'weather': 'raining, snowing, foggy, warm, windy, hailing, freezing, sunny',
  'when': """last Tuesday, on a Sunday afternoon, at a festival, at a matinee,
    on an old television, at the film club, during a power cut""",
  'person': """my sister, my uncle, my neighbour, my dentist, my boss, a friend,
    my cousin, my landlady, my barber, the local paper, my grandmother""",
  'colour': 'crimson, yellow, violet, grey, turquoise, orange, pale blue',
  'music': 'cello, accordion, harp, bassoon, piano, banjo, oboe, tuba, zither',
  'topic': """grain prices, a lost inheritance, rival bakeries, sleepwalking,
    stamp collecting, the tides, an exiled duke, a comet, beetroot farming""",
  'steals': 'buries, paints, repairs, borrows, hides, sells, polishes, steals',
  'season': 'spring, summer, autumn, winter, harvest time, carnival week',
  'degree': 'really, truly, quite, simply, frankly, rather, thoroughly',
  'opener': """in short, all in all, for the record, if you ask me, frankly,
    to my mind, when all is said and done, looking back, in the end""",
  'subject': """it, the film, the movie, the story, the whole thing, the plot,
    this picture, the acting, the script, the photography, the dialogue,
    the editing, the music, the ending, the direction, {title}""",
  'told': 'told me, claimed, swore, announced, insisted, wrote, warned me',
}

# One template per line. `not {-adj}` praises when `adj` blames; a sentiment
# word with no sign is a distractor, it may be either.
_TEMPLATES = {
  'plain': """{subject} is {+adj}
    {subject} is {+adj} and {+adj}
    {subject} was {degree} {+adj}
    {subject} is a {+noun}
    {subject} {+verb}
    {subject} {+verb} from start to finish
    {subject} never stops being {+adj}
    nobody can deny that {subject} is {+adj}
    {subject} is not only {+adj} but a {+noun}""",
  'negated': """{subject} is not {-adj}
    {subject} is hardly {-adj} or {-adj}
    {subject} was never {-adj}
    {subject} is not a {-noun}
    {subject} is hardly a {-noun}
    {subject} never {-verb}
    {subject} never once {-verb}
    there is nothing {-adj} about {subject}
    {subject} is anything but {-adj}
    only a sleepy {animal} would call {subject} a {-noun}""",
  'feeling': """I {+felt} {subject}
    I found {subject} {+adj}
    I was {+state} by {subject}
    I can't say I {-felt} {subject}
    I was not {-state} by {subject}""",
  'statement': """{+clause}.
    {+clause}!
    {opener}, {+clause}.
    {+clause}, and {+clause}.
    I say this as a {job}: {+clause}.""",
  'turn': """although {-clause}, {+clause}.
    {-clause}, but {+clause}.
    I wanted to {-feel} it, but {+clause}.
    I did not expect to {+feel} it, but {+clause}.
    {person} {told} that {-claim}, which is nonsense.
    everyone told me it was {-adj}; they were wrong.
    {person} called it {+adj}, and I agree.
    {person} {told} that {+claim}, and that is right.""",
  'neutral': """I saw {title} {when}.
    {person} picked {title}, because the poster shows a {colour} {animal}.
    the film opens in {town}, where {hero} works as a {job}.
    {hero} is a {job} who inherits a {adj} {thing} from a distant cousin.
    the trouble starts when {rival} {steals} the {thing}.
    {star} plays {hero}, and {rival} is played by a former {job}.
    from there the plot moves to {town} by {vehicle} and later by {vehicle}.
    {director} directed it after {number} years of {genre} films.
    in one scene a {adj} {animal} wanders through the {room} at breakfast.
    there is a long chase through the {place}, filmed from a {vehicle}.
    the {animal} does not appear again until the last reel.
    the script is based on a {adj} novel about {topic}.
    the score is written for {music}, {music} and {music}.
    next to me sat a {job} with a {adj} hat and a bag of {food}.
    outside it was {weather}, and the queue reached the {place}.
    {rival} does not know that the {thing} belongs to the {job}.
    nobody in {town} ever asks where the {adj} {thing} came from.
    they search the {room}, but the {thing} is already in {town}.
    although it is {season}, everyone in {town} wears a {colour} coat.
    {hero} {steals} a {thing}, {steals} a {thing} and misses the {vehicle}.
    halfway through, {star} recites a {adj} poem about {topic}.
    a {job} explains {topic} to a {job}, who explains it to a {animal}.
    {director} is said to have rebuilt the {place} of {town} in a {room}.
    the costumes are {colour} in the first hour and {colour} after that.
    it takes {number} days and a {vehicle} to bring the {animal} home.
    we had {food} in the interval and talked about {topic}.
    a flashback shows {hero} and {rival} at school, arguing about {topic}.
    the {job} hates {food}, loves {topic} and is never without a {thing}.
    at the wedding, the {adj} {job} gives the couple a {colour} {thing}.
    {hero} says no {number} times, then boards the {vehicle}.
    {rival} wants to sell the {place} and buy a {vehicle}.""",
}

# Drawn once per review, so that a review keeps to one film.
_CAST = {'title': '{title}', 'hero': '{first}', 'rival': 'Doctor {last}',
         'star': '{name}', 'director': '{name}'}

# Words wanted in a review, at equally spaced quantiles; the last sentence may
# go over. Every so many words there is one more verdict.
_LENGTHS = (22, 40, 54, 66, 78, 92, 110, 134, 172, 240, 470)
_WORDS_PER_VERDICT = 40

# Rule -> (negative words, positive words).
SENTIMENT = {name: tuple(re.split(r',\s+', words) for words in pair)
             for name, pair in _SENTIMENT.items()}
_RULES = {name: re.split(r',\s+', words) for name, words in _WORDS.items()}
_RULES |= {name: re.split(r'\n\s+', text) for name, text in _TEMPLATES.items()}


def _pick(rng: random.Random, options: Sequence):
  # Only `Random.random` is promised to stay the same between Python versions.
  return options[int(rng.random() * len(options))]


def _expand(rng: random.Random, template: str, sense: int, cast: dict) -> str:
  """Fills the slots of a template that has to mean `sense` (0 bad, 1 good)."""
  def fill(slot):
    sign, name = slot.groups()
    if name in cast:
      return cast[name]
    inner = {'+': sense, '-': 1 - sense, '': _pick(rng, (0, 1))}[sign]
    options = SENTIMENT[name][inner] if name in SENTIMENT else _RULES[name]
    return _expand(rng, _pick(rng, options), inner, cast)
  return re.sub(r'\{([+-]?)(\w+)\}', fill, template)


def _review(rng: random.Random, label: int) -> str:
  cast = {k: _expand(rng, rule, label, {}) for k, rule in _CAST.items()}

  def sentence(template):
    text = _expand(rng, template, label, cast)
    text = re.sub(r'\ba (?=[aeiou])', 'an ', text)
    return text[0].upper() + text[1:]

  step, part = divmod(rng.random() * (len(_LENGTHS) - 1), 1)
  low, high = _LENGTHS[int(step):int(step) + 2]
  wanted = int(low + part * (high - low))
  verdicts = [sentence('{+verdict}')
              for _ in range(min(6, 2 + wanted // _WORDS_PER_VERDICT))]
  words = sum(len(verdict.split()) for verdict in verdicts)
  story = []
  shuffled = sorted(_RULES['neutral'], key=lambda _: rng.random())
  for template in itertools.cycle(shuffled):
    if words >= wanted:
      break
    story.append(sentence(template))
    words += len(story[-1].split())
  for verdict in verdicts:
    story.insert(int(rng.random() * (len(story) + 1)), verdict)
  return ' '.join(story)


def _reviews(rng: random.Random, n: int) -> Iterator[tuple[str, int]]:
  label = 0
  for index in range(n):
    label = 1 - label if index % 2 else _pick(rng, (0, 1))
    yield _review(rng, label), label


def generate(seed: int, n: int) -> Iterator[tuple[str, int]]:
  """Writes a corpus of reviews; the same everywhere for the same arguments.

  The classes alternate within pairs of random order, so that every prefix is
  balanced to within one review, and a longer corpus begins with a shorter one.

  Args:
    seed: Any integer not below 0; another seed, another corpus.
    n: Number of reviews, at least 1.

  Returns:
    An iterator over `n` pairs of text (20 to 500 words) and label (1 positive,
    0 negative).

  Raises:
    ValueError: If `n` is less than 1.
  """
  if n < 1:
    raise ValueError(f'n must be at least 1, got {n}')
  return _reviews(random.Random(seed), n)


class GrammarReviews(  # type: ignore[call-arg]
    tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """What `generate` writes, as a tfds data set; no network is needed."""

  name = 'grammar_reviews'
  # Raise it, here and in sources.PATHS, whenever `generate` writes other text.
  VERSION = tfds.core.Version('1.0.0')

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
        builder=self,
        description='Generated movie reviews, positive and negative.',
        features=tfds.features.FeaturesDict({
            'text': tfds.features.Text(),
            'label': tfds.features.ClassLabel(names=['neg', 'pos']),
        }),
        supervised_keys=('text', 'label'),
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # nothing is downloaded
    reviews = list(generate(seed=0, n=5_000))
    return {
        'train': self._generate_examples(reviews[:4_000]),
        'test': self._generate_examples(reviews[4_000:]),
    }

  def _generate_examples(self, reviews: Iterable[tuple[str, int]]):
    for key, (text, label) in enumerate(reviews):
      yield key, {'text': text, 'label': label}
