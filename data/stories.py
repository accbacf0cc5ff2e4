"""A grammar of small children's stories whose entropy is known exactly: the built-in corpus.

A story is drawn by expanding the rule "story". Wherever a rule has n alternatives, one of them is
taken with probability 1/n, and no two derivations give the same text, so

    log p(text)  =  - sum over the choices made of ln n                                    nats
    H(rule)      =  ln n + 1/n * sum over its alternatives of (sum of H of the rules in it)

H("story") is the entropy of the corpus: no model's expected loss per story is below it. Measured
on given stories the floor is their mean -log p, and "how far from optimal" becomes a number.

What makes a model work for it is agreement over the whole story: he, she and they follow the
name; what was lost is what is found, and by whom; the promise is kept in the words it was made,
in the past tense; one of seven shells given away leaves six; things lie where they can lie at that
place; the weather and the place of the beginning come back at the end.

How to read an alternative of GRAMMAR:

    {close}              expand the rule "close"
    {hero=girl}          expand "girl" and remember the text under "hero"
    {hero}               the text remembered under "hero"
    {hero.his}           a form of it: a pronoun, a tense, a number (see `inflect`)
    {spot=spot @place}   expand the rule "spot @" + what is remembered under "place"

Every sampled story can be read back: `parse` finds its derivation, or says which rule a text
breaks first and where. The instruct form puts a request before the story, as TinyStories-Instruct
does: `Words: ...`, `Features: ...`, `Story: ...`; `check` tells whether a story fulfils it.

Sources: the manner of the stories and the instruct form follow Eldan & Li 2023 (arXiv 2305.07759);
the entropy of a grammar by recursion: Grenander 1967.

Run: `python data/stories.py` (CPU, about 1 s on 2 cores of an AMD EPYC (Zen 5)) prints

    In a small town, there were shy twins named Milo and Nick. More than anything, they liked
    planting seeds. It was a gray Saturday. "Will you clean the bedroom today?" asked Uncle Bob.
    "Yes, we will," said Milo and Nick.

    But first, they wanted to visit the market with Ned. "Look, nine ribbons!" said Milo and Nick,
    and put them all in a box. Ned asked for one of the ribbons. Milo and Nick nodded and kept
    eight.

    That night, Milo and Nick cleaned the bedroom. "Thank you for keeping your promise," said
    Uncle Bob. After that gray Saturday, Milo and Nick always called Ned a true friend.

    20,000 stories in 1.5 s: 73 to 142 words, 743 different words; 4.8e+22 stories are possible
    entropy 46.3366 nats a story; mean of the 20,000: 46.3460 +- 0.0296
    with another name at the end, rule hero is broken: word 100 is Nobody, wanted Milo and Nick
    (hero is Milo and Nick)
    a request: 'Words: gray, brown, orchard\\nFeatures: Lost and found\\nStory: '
    ok: every story reads back to the probability it was drawn with
"""

from __future__ import annotations

import math
import os
import random
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

# Words

GIRLS = """Lily Mia Anna Sara Lucy Emma Nora Ella Ruby Zoe Amy Rose Molly Ivy Clara Daisy Hannah
Julia Tina Bella""".split()
BOYS = """Tom Ben Max Sam Leo Jack Tim Noah Finn Luke Adam Oscar Henry Paul Theo Felix Hugo Peter
Simon David""".split()
TWINS_FIRST = "Pia Kai Lola Milo Jenny Otto Suzy Rob".split()
TWINS_SECOND = "Fred Gina Carl Tess Walt Dora Nick Maya".split()
FRIEND_GIRLS = "Alice Grace Kate Maria Olive Penny Sophie Vera Wendy Jane Holly Betty".split()
FRIEND_BOYS = "Alex Bill Charlie Dan Eric George Harry Joe Mark Ned Ralph Victor".split()
WOMEN = ["Mom", "Grandma", "Aunt May", "Miss Hill"]
MEN = ["Dad", "Grandpa", "Uncle Bob", "Mister Wood"]
NUMBERS = "one two three four five six seven eight nine ten".split()
PROMISES = {  # what is promised -> what was done
    "water the flowers": "watered the flowers",
    "feed the cat": "fed the cat",
    "wash the dishes": "washed the dishes",
    "set the table": "set the table",
    "clean the bedroom": "cleaned the bedroom",
    "fold the towels": "folded the towels",
    "brush the dog": "brushed the dog",
    "sweep the floor": "swept the floor",
    "write a letter": "wrote a letter",
    "mend the fence": "mended the fence",
    "pick the tomatoes": "picked the tomatoes",
    "bake a cake": "baked a cake",
    "lock the gate": "locked the gate",
    "make the beds": "made the beds",
    "polish the shoes": "polished the shoes",
    "peel the potatoes": "peeled the potatoes",
}
# place: four spots where a thing may lie; three kinds of things to gather
PLACES = {
    "park": ("under the old oak tree/behind a green bench/beside the fountain/by the tall slide",
             "acorns feathers pebbles"),
    "beach": ("next to a sand castle/under a striped umbrella/in a rock pool/behind a rowing boat",
              "shells pebbles corks"),
    "farm": ("in a pile of hay/behind the red barn/next to the tractor/inside the chicken house",
             "eggs carrots feathers"),
    "pond": ("among the reeds/on a lily pad/under the wooden bridge/beside a mossy log",
             "pebbles reeds feathers"),
    "market": ("under a fruit stand/between two barrels/behind the flower cart/on some cabbages",
               "plums lemons ribbons"),
    "playground": ("under the swings/at the bottom of the slide/in the sandbox/behind the seesaw",
                   "marbles stickers buttons"),
    "river": ("between the wet stones/on the muddy bank/under a willow/behind a fallen trunk",
              "stones sticks corks"),
    "library": ("between two thick books/under the reading chair/on the top shelf/behind a globe",
                "bookmarks stickers pencils"),
    "zoo": ("near the monkey cage/behind the ticket booth/beside the penguin pool/under a map",
            "tickets feathers stickers"),
    "school": ("under a desk/behind the blackboard/in the music room/next to the piano",
               "pencils crayons marbles"),
    "harbor": ("inside a coil of rope/behind a crate of fish/on the pier/under a fishing net",
               "corks shells coins"),
    "museum": ("behind a stone lion/under the dinosaur/next to a knight/on the marble stairs",
               "tickets coins postcards"),
    "orchard": ("at the top of a ladder/under an apple tree/in an empty basket/behind the wall",
                "apples pears plums"),
    "garden": ("under a rose bush/between the pumpkins/behind the shed/in a clay pot",
               "carrots snails tulips"),
    "fair": ("under the carousel/behind the popcorn stand/next to the drums/on a hay cart",
             "tickets balloons coins"),
    "lake": ("in a little canoe/under the wooden dock/beside the campfire/behind a pine tree",
             "pebbles sticks acorns"),
}  # fmt: skip

# Sentences

GRAMMAR = {
    "story": [
        "{opening} {setting}\n\n{lose} {search}\n\n{find} {thank}\n\n{close}{lost moral}",
        "{opening} {ask}\n\n{going} {tempt}\n\n{keep}\n\n{close}{promise moral}",
        "{opening} {setting}\n\n{gather} {share}\n\n{recount}\n\n{close}{count moral}",
        "{opening} {ask}\n\n{going} {lose}\n\n{find}\n\n{keep} {close}",
        "{opening} {ask}\n\n{going} {gather} {share}\n\n{keep} {close}",
    ],
    "opening": [
        "{once} there was a {trait=trait} girl named {hero=girl}. {habit}",
        "{once} there was a {trait=trait} boy named {hero=boy}. {habit}",
        "{once} there were {trait=trait} twins named {hero=twins}. {habit}",
    ],
    "once": [
        "Once upon a time,",
        "Long ago,",
        "In a small town,",
        "By the blue sea,",
        "Not so long ago,",
        "On a quiet street,",
    ],
    "trait": """kind brave curious clever shy cheerful gentle funny polite patient silly helpful
        careful playful lively thoughtful""".split(),
    "girl": GIRLS,
    "boy": BOYS,
    "twins": ["{twins first} and {twins second}"],
    "twins first": TWINS_FIRST,
    "twins second": TWINS_SECOND,
    "habit": [
        "{hero.He} loved {hobby} and eating {food}.",
        "More than anything, {hero.he} liked {hobby}.",
        "All day long, {hero.he} dreamed of {hobby}.",
        "{hero.He} {hero.was} very good at {hobby}.",
        "Sometimes {hero.he} got tired of {hobby}, but never of {food}.",
    ],
    "hobby": [
        "painting pictures", "building towers", "climbing trees", "singing songs", "riding bikes",
        "telling jokes", "flying kites", "planting seeds", "reading books", "playing music",
        "solving puzzles", "watching birds", "making masks", "chasing butterflies",
        "jumping rope", "drawing maps",
    ],
    "food": """soup pancakes noodles cheese honey strawberries toast popcorn pudding cookies grapes
        waffles""".split(),

    "setting": [
        "One {weather=weather} {day=day}, {hero} went to the {place=place} with {friend=friend}.",
        "On a {weather=weather} {day=day}, {hero} met {friend=friend} at the {place=place}.",
        "It was a {weather=weather} {day=day}, and {friend=friend} took {hero} to the "
        "{place=place}.",
        "One {weather=weather} {day=day}, {friend=friend} invited {hero} to the {place=place}.",
    ],
    "weather": """sunny windy cloudy rainy foggy warm chilly misty breezy bright gray
        golden""".split(),
    "day": "morning afternoon day Saturday Sunday Friday".split(),
    "place": list(PLACES),
    "friend": FRIEND_GIRLS + FRIEND_BOYS,

    "lose": [
        "They played with a {color=color} {toy=toy} for an hour. Then {hero} saw that the {toy} "
        "was gone.",
        "{hero} took a {color=color} {toy=toy} out of a bag to show {friend}. A moment later, it "
        "was gone.",
        "{hero} held {hero.his} {color=color} {toy=toy} tight, but somewhere along the way it "
        "was lost.",
        "{hero} wanted to show everyone {hero.his} new {color=color} {toy=toy}. But when "
        "{hero.he} looked, the {toy} was missing.",
    ],
    "color": "red blue green yellow pink purple white black brown silver shiny spotted".split(),
    "toy": """ball kite doll boat drum whistle hat scarf robot truck puppet lantern glove trumpet
        mirror necklace bracelet teddy train dragon crown flag yo-yo kazoo""".split(),
    "search": [
        "{hero.He} looked {wrong spot}, but found only crumbs.",
        '"Where is {hero.my} {color} {toy}?" cried {hero}. {hero.He} searched {wrong spot}. '
        "No luck.",
        '"Oh no, {hero.my} {toy}!" said {hero}. {hero.He} checked {wrong spot} and began to cry.',
        "{hero} felt {sad}. {hero.He} looked {wrong spot} twice, but the {toy} was not there.",
    ],
    "wrong spot": [
        "in {hero.his} pockets", "inside the picnic basket", "under {hero.his} coat",
        "in {hero.his} boots", "in every corner of the bag", "all along the path",
    ],
    "sad": "sad worried upset lonely unhappy miserable".split(),
    "find": [
        "{finder=that friend} did not give up. {friend.He} looked {spot=spot @place} and saw "
        "something {color}. It was the {toy}!",
        "Then a {size} {animal=animal} came by. \"I saw a {color} {toy} {spot=spot @place},\" said "
        "{finder=that animal}. {hero} looked, and there it was!",
        "{finder=that friend} had an idea. Together they looked {spot=spot @place}. There was the "
        "{color} {toy}, a bit dirty but safe.",
        "Just then, a {size} {animal=animal} sat down {spot=spot @place}, right beside something "
        "{color}. So it was {finder=that animal} who found the {toy}.",
    ],
    "that friend": ["{friend}"],
    "that animal": ["the {animal}"],
    "size": "small big tiny fluffy friendly sleepy hungry round".split(),
    "animal": """squirrel rabbit puppy kitten duck frog turtle fox robin mouse pony goat hedgehog
        beaver lamb sparrow crow badger parrot goose pigeon swan cat donkey""".split(),
    "thank": [
        '"Thank you!" said {hero}, and hugged {finder}.',
        "{hero} {hero.was} so happy that {hero.he} gave {finder} a {gift}.",
        "Later, a neighbor asked who had found the {color} {toy}. \"It was {finder},\" said "
        "{hero}.",
        "{hero} danced for joy and shared a {treat} with {finder}.",
    ],
    "gift": ["big hug", "warm smile", "paper star", "red cherry", "soft pat", "loud cheer"],
    "treat": "sandwich cupcake peach muffin banana pretzel biscuit tart".split(),

    "ask": [
        "One {weather=weather} {day=day}, {parent=parent} had a wish. \"Please {promise=chore},\" "
        "{parent.he} said. \"{hero.I} promise,\" said {hero}.",
        "On a {weather=weather} {day=day}, {hero} promised {parent=parent} to {promise=chore} "
        "before bedtime.",
        "It was a {weather=weather} {day=day}. \"Will you {promise=chore} today?\" asked "
        "{parent=parent}. \"Yes, {hero.i} will,\" said {hero}.",
        "One {weather=weather} {day=day}, {parent=parent} asked {hero} to {promise=chore}. {hero} "
        "gave {hero.his} word.",
    ],
    "parent": WOMEN + MEN,
    "chore": list(PROMISES),
    "going": [
        "Then {hero} ran to the {place=place}, where {friend=friend} was waiting.",
        "Soon {hero} left for the {place=place} to meet {friend=friend}.",
        "But first, {hero.he} wanted to visit the {place=place} with {friend=friend}.",
        "Later, {friend=friend} called, and they went to the {place=place} together.",
    ],
    "tempt": [
        "They played {game} all day. When the sun went down, {friend} said, \"Stay a little "
        "longer!\" But {hero} said no. \"{hero.I} told {parent} that {hero.i} would {promise}.\"",
        "{friend} had a plan. \"Let us play {game} until dark!\" It sounded like fun, but {hero} "
        "thought of {parent} and the promise.",
        "They played {game}, and time went by fast. {friend} begged {hero.him} not to go. {hero} "
        "wanted to stay, but a promise to {parent} was a promise.",
        "They began to play {game}, and {hero} almost forgot to {promise}. Then {friend} asked "
        "what time it was, and {hero.he} remembered {parent}.",
    ],
    "game": """tag catch chess hopscotch pirates hide-and-seek knights dominoes cards leapfrog
        soccer tennis""".split(),
    "keep": [
        "So {hero} hurried home and {promise.past}. {parent} smiled. \"You kept your word,\" "
        "{parent.he} said.",
        "Before bedtime, {hero} {promise.past}, just as {hero.he} had promised {parent}.",
        "At home, {hero} {promise.past} without being reminded. {parent} was proud and gave "
        "{hero.him} a {treat}.",
        "That night, {hero} {promise.past}. \"Thank you for keeping your promise,\" said {parent}.",
    ],

    "gather": [
        "There {hero} found {number=number} {items=items @place} and put them in a "
        "{container=container}.",
        "{hero} picked up {number=number} {items=items @place}, one after another, and carried "
        "them in a {container=container}.",
        "Soon, {hero} had {number=number} {items=items @place} in a {container=container}, and "
        "{friend} had none.",
        "\"Look, {number=number} {items=items @place}!\" said {hero}, and put them all in a "
        "{container=container}.",
    ],
    "number": NUMBERS[3:],
    "container": "bucket basket box jar sack cap bowl pouch".split(),
    "share": [
        "{friend} looked {sad}. So {hero} gave {friend.him} one {items.one}. Now there were "
        "{number.less} left.",
        "\"Please take one {items.one},\" said {hero}. {friend} smiled. That left {number.less} "
        "{items} in the {container}.",
        "{friend} asked for one of the {items}. {hero} nodded and kept {number.less}.",
        "{hero} gave one {items.one} to a {size} {animal=animal} that came by and kept "
        "{number.less}.",
    ],
    "recount": [
        "At the door, a neighbor asked how many {items} were in the {container}. "
        "\"{number.Less},\" said {hero}.",
        "Before bed, {hero} put all {number.less} {items} on the {furniture} and looked at them "
        "for a long time.",
        "At home, {hero} emptied the {container} and counted: {number.less} {items}. There had "
        "been {number} before, but {hero.he} did not mind.",
        "{hero.He} washed the {number.less} {items}, dried them, and kept them in the {container} "
        "for years.",
    ],
    "furniture": "shelf desk table windowsill piano dresser".split(),

    "close": [
        "It had been a {weather} {day} that {hero} would never forget.",
        "{hero} fell asleep and dreamed of the {place}.",
        "{hero} hoped that the next {day} would be just as {weather}.",
        "From then on, everyone at the {place} knew how {trait} {hero} {hero.was}.",
        "After that {weather} {day}, {hero} always called {friend} a true friend.",
        "This was the tale of {hero}, who {hero.was} so {trait}, and of a {weather} {day} at "
        "the {place}.",
    ],
    "lost moral": [
        "",
        " Good friends help each other look.",
        " Lost things wait for those who look.",
        " It is wise to ask for help.",
    ],
    "promise moral": [
        "",
        " A promise is a small thing that matters a lot.",
        " People trust those who do what they say.",
        " Work comes first, and then the fun is better.",
    ],
    "count moral": [
        "",
        " Sharing makes a little feel like plenty.",
        " What we give away makes us rich.",
        " Giving is sweeter than having.",
    ],
}  # fmt: skip

for place, (spots, items) in PLACES.items():
    GRAMMAR[f"spot @{place}"] = spots.split("/")
    GRAMMAR[f"items @{place}"] = items.split()

PRONOUNS = {
    "she": {"he": "she", "him": "her", "his": "her", "was": "was", "i": "I", "my": "my"},
    "he": {"he": "he", "him": "him", "his": "his", "was": "was", "i": "I", "my": "my"},
    "they": {"he": "they", "him": "them", "his": "their", "was": "were", "i": "we", "my": "our"},
}
PRONOUN_OF = dict.fromkeys(GIRLS + FRIEND_GIRLS + WOMEN, "she")
PRONOUN_OF |= dict.fromkeys(BOYS + FRIEND_BOYS + MEN, "he")


@cache
def inflect(value: str, form: str) -> str:
    """A form of a remembered text; a form with a capital is the form with a capital.

    Forms: he him his was i my (pronouns by name), past (of a promise), one (of things), less (the
    number before), and "" for the text itself.
    """
    if form == "":
        return value
    if form != form.lower():
        changed = inflect(value, form.lower())
        return changed[0].upper() + changed[1:]
    if form == "past":
        return PROMISES[value]
    if form == "one":
        return value.removesuffix("s")
    if form == "less":
        return NUMBERS[NUMBERS.index(value) - 1]
    return PRONOUNS[PRONOUN_OF.get(value, "they")][form]  # a name not listed is a pair of twins


# The grammar, taken apart once: an alternative is a sequence of literal texts and of


@dataclass(frozen=True)
class Use:
    """{variable} or {variable.form}: what is remembered."""

    variable: str
    form: str

    def text(self, memory: dict[str, str]) -> str:
        return inflect(memory[self.variable], self.form)


@dataclass(frozen=True)
class Expand:
    """{rule}, {variable=rule}, or {variable=rule @given}: a choice to be made."""

    rule: str
    variable: str | None
    given: str | None

    def name(self, memory: dict[str, str]) -> str:
        return self.rule if self.given is None else f"{self.rule} @{memory[self.given]}"


VARIABLES = {
    name
    for alternatives in GRAMMAR.values()
    for text in alternatives
    for name in re.findall(r"\{(\w+)=", text)
}


def take_apart(alternative: str) -> tuple[str | Use | Expand, ...]:
    parts = []
    for i, piece in enumerate(re.split(r"[{}]", alternative)):
        if i % 2 == 0:
            if piece:
                parts.append(piece)
        elif "=" in piece:
            variable, rule = piece.split("=")
            rule, _, given = rule.partition(" @")
            parts.append(Expand(rule, variable, given or None))
        elif piece.partition(".")[0] in VARIABLES:
            variable, _, form = piece.partition(".")
            parts.append(Use(variable, form))
        else:
            parts.append(Expand(piece, None, None))
    return tuple(parts)


RULES = {rule: [take_apart(text) for text in texts] for rule, texts in GRAMMAR.items()}


# Sampling


def sample(rng: random.Random) -> tuple[str, float]:
    """A story and its log-probability in nats; rng is a random.Random or a numpy Generator."""
    pieces, memory = [], {}

    def expand(rule: str) -> float:
        alternatives = RULES[rule]
        log_probability = -math.log(len(alternatives))
        for part in alternatives[int(rng.random() * len(alternatives))]:
            if isinstance(part, str):
                pieces.append(part)
            elif isinstance(part, Use):
                pieces.append(part.text(memory))
            else:
                begin = len(pieces)
                log_probability += expand(part.name(memory))
                if part.variable is not None:
                    memory[part.variable] = "".join(pieces[begin:])
        return log_probability

    log_probability = expand("story")
    return "".join(pieces), log_probability


def corpus(count: int, seed: int) -> Iterator[tuple[str, float]]:
    """`count` stories with their log-probabilities, the same for the same seed."""
    rng = random.Random(seed)
    for _ in range(count):
        yield sample(rng)


# Exact figures of the grammar


def over_alternatives(rule: str, given: str | None) -> list[str]:
    """The rules that a slot may expand: itself, or one for each value of what it depends on."""
    return [rule] if given is None else [f"{rule} @{value}" for value in GRAMMAR[given]]


@cache
def entropy(rule: str = "story") -> float:
    """Entropy in nats of the texts of a rule.

    Choices are independent but for the slots "rule @given"; there the mean over the values of
    `given` is exact, because these are equally likely and nothing else depends on them.
    """
    alternatives, total = RULES[rule], 0.0
    for parts in alternatives:
        for part in parts:
            if isinstance(part, Expand):
                rules = over_alternatives(part.rule, part.given)
                total += sum(entropy(r) for r in rules) / len(rules)
    return math.log(len(alternatives)) + total / len(alternatives)


@cache
def derivations(rule: str = "story") -> int:
    """The number of different texts of a rule (of a slot "rule @given": at each value, at least).

    One text per derivation, so it is a sum over alternatives of products over their slots.
    """
    return sum(
        math.prod(
            min(derivations(r) for r in over_alternatives(part.rule, part.given))
            for part in parts
            if isinstance(part, Expand)
        )
        for parts in RULES[rule]
    )


# Reading a story back


@dataclass(frozen=True)
class Derivation:
    """How the grammar tells a text."""

    log_probability: float  # nats
    choices: tuple[tuple[str, int], ...]  # rule and number of the alternative, in order
    memory: dict[str, str]  # the variables: who, what, where


@dataclass(frozen=True)
class Broken:
    """Why a text is not a story: the rule that its longest readable beginning breaks."""

    rule: str  # of GRAMMAR, or VARIABLE.FORM where the text contradicts what it said before
    position: int  # of the first wrong word: characters from the beginning
    message: str


def parse(text: str) -> Derivation | Broken:
    """The one derivation of a text, or the first rule it breaks and where."""
    readings, failures = [], []
    # each state: where in the text, what is remembered, choices made, and a linked list of
    # (part, its rule) that are still to come, or of (variable, begin) that are to be remembered
    states = [(0, {}, (), ((Expand("story", None, None), "story"), None))]
    while states:
        at, memory, choices, todo = states.pop()
        if todo is None:
            if at == len(text):
                log_probability = -sum(math.log(len(RULES[rule])) for rule, _ in choices)
                readings.append(Derivation(log_probability, choices, memory))
            else:
                failures.append((at, "", "end of story", memory, None))
            continue
        (part, rule), todo = todo
        if isinstance(rule, int):
            states.append((at, {**memory, part: text[rule:at]}, choices, todo))
        elif isinstance(part, Expand):
            name = part.name(memory)
            if part.variable is not None:
                todo = ((part.variable, at), todo)
            for i, parts in enumerate(RULES[name]):
                if parts and isinstance(parts[0], str) and not text.startswith(parts[0], at):
                    failures.append((at, parts[0], name, memory, None))
                    continue
                after = todo
                for new in reversed(parts):
                    after = ((new, name), after)
                states.append((at, memory, (*choices, (name, i)), after))
        else:
            wanted = part if isinstance(part, str) else part.text(memory)
            if text.startswith(wanted, at):
                states.append((at + len(wanted), memory, choices, todo))
            else:
                use = part if isinstance(part, Use) else None
                failures.append((at, wanted, rule, memory, use))
    if readings:
        assert len(readings) == 1, f"{len(readings)} derivations of {text!r}"
        return readings[0]
    return explain(text, failures)


def explain(text: str, failures: list[tuple[int, str, str, dict, Use | None]]) -> Broken:
    """The failure that lies furthest in the text; agreement before the choice of words."""
    located = []
    for at, wanted, rule, memory, use in failures:
        same = len(os.path.commonprefix((text[at : at + len(wanted)], wanted)))
        good = at + same  # so many characters are right
        if text[good : good + 1].strip() or wanted[same : same + 1].strip():
            begin = max(text.rfind(" ", 0, good), text.rfind("\n", 0, good)) + 1
            word = (text[:at] + wanted)[begin:].split(" ")[0]  # the one that should begin there
        else:  # a word ends in both, and what comes behind it is wrong
            begin = min(good + 1, len(text))
            word = (wanted[same:].split() or ["another word" if wanted[same:] else ""])[0]
        located.append((begin, use is not None, word, rule, memory, use))
    position, _, _, rule, memory, use = max(located, key=lambda failure: failure[:2])
    if use is None:
        here = [failure for failure in located if failure[0] == position and failure[3] == rule]
        words = {failure[2] or "the end" for failure in here}
        wanted = " or ".join(sorted(words)[:4]) + (" or ..." if len(words) > 4 else "")
    else:
        rule = use.variable + (f".{use.form}" if use.form else "")
        wanted = f"{use.text(memory)} ({use.variable} is {memory[use.variable]})"
    number = len(text[:position].split()) + 1
    found = (text[position:].split() or ["the end of the text"])[0]
    return Broken(rule, position, f"word {number} is {found[:40]}, wanted {wanted}")


# The instruct form

FEATURES = {  # name -> a rule that only stories with this feature use
    "Lost and found": "find",
    "Promise": "keep",
    "Sharing": "share",
}
ASKABLE = "trait weather place color toy animal container items friend".split()  # variables


def features_of(story: str, derivation: Derivation) -> list[str]:
    """The features of a story: those of FEATURES, "Dialogue" and "Moral"."""
    used = dict(derivation.choices)  # the number of the alternative, by rule
    found = [name for name, rule in FEATURES.items() if rule in used]
    if '"' in story:
        found.append("Dialogue")
    if any(rule.endswith(" moral") and i > 0 for rule, i in used.items()):
        found.append("Moral")
    return found


def instruct(rng: random.Random) -> tuple[str, str]:
    """A request and a story that fulfils it: `prompt + story` is one training text.

    The prompt is "Words: a, b, c\\nFeatures: d, e\\nStory: ".
    """
    story, _ = sample(rng)
    derivation = parse(story)
    words = [derivation.memory[name] for name in ASKABLE if name in derivation.memory]
    words = [words.pop(int(rng.random() * len(words))) for _ in range(3)]
    wanted = [feature for feature in features_of(story, derivation) if rng.random() < 0.7]
    return f"Words: {', '.join(words)}\nFeatures: {', '.join(wanted)}\nStory: ", story


def check(words: list[str], features: list[str], story: str) -> list[str]:
    """What a story lacks of a request, a line each; an empty list when nothing.

    Raises: ValueError for a feature that does not exist.
    """
    known = [*FEATURES, "Dialogue", "Moral"]
    for feature in features:
        if feature not in known:
            raise ValueError(f"feature {feature!r}: wanted one of {', '.join(known)}")
    lacks = []
    for word in words:
        if not re.search(rf"\b{re.escape(word)}\b", story):
            lacks.append(f"the word {word} is missing")
    derivation = parse(story)
    if isinstance(derivation, Broken):
        return [*lacks, f"rule {derivation.rule} is broken: {derivation.message}"]
    found = features_of(story, derivation)
    return lacks + [f"the feature {f} is missing" for f in features if f not in found]


def demo() -> None:
    start = time.perf_counter()
    drawn = list(corpus(20_000, seed=0))
    seconds = time.perf_counter() - start
    text = " ".join(story for story, _ in drawn).lower()
    words = set(re.findall(r"[a-z]+(?:-[a-z]+)*", text))
    lengths = [len(story.split()) for story, _ in drawn]
    print(f"{drawn[0][0]}\n")
    print(
        f"20,000 stories in {seconds:.1f} s: {min(lengths)} to {max(lengths)} words, "
        f"{len(words)} different words; {derivations():.1e} stories are possible"
    )
    mean = sum(-log_probability for _, log_probability in drawn) / len(drawn)
    square = sum(log_probability**2 for _, log_probability in drawn) / len(drawn)
    error = math.sqrt((square - mean**2) / len(drawn))
    print(f"entropy {entropy():.4f} nats a story; mean of the 20,000: {mean:.4f} +- {error:.4f}")

    for story, log_probability in drawn[:300]:
        assert abs(parse(story).log_probability - log_probability) < 1e-9
    story = drawn[0][0]
    hero = parse(story).memory["hero"]
    end = story.rindex(hero)
    wrong = parse(story[:end] + "Nobody" + story[end + len(hero) :])
    print(f"with another name at the end, rule {wrong.rule} is broken: {wrong.message}")
    prompt, story = instruct(random.Random(1))
    print(f"a request: {prompt!r}")
    assert abs(mean - entropy()) < 4 * error and wrong.rule == "hero"
    print("ok: every story reads back to the probability it was drawn with")


if __name__ == "__main__":
    demo()
