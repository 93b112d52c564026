"""Write the demo's pool.jsonl, target.jsonl and test.jsonl: `python -m pipelines.demo_data.make`.

With a folder it writes them there, the target as dev.jsonl: rows to try the lines of the READMEs on.

Everything below is written by hand for this project: sentences, word lists and facts. Whatever can be computed (sums,
dates, sorted lists, JSON) is computed. The rows depend on nothing but this file: the order comes from hashes, not from
a random generator whose stream may change between Python versions.

The target is a house style that no base model knows: a booking, told in a sentence, becomes the line
`city: Lyon | day: 1 Jan | cost: 54 EUR`. 24 of the 240 pool rows teach it, in other words than the target uses and
spread over three sources; `relevant_ids` names them. Decoys share the target's topic, cities or wording and answer
otherwise.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from pathlib import Path

from datatools import DatatoolsError, UsageError, files

FOLDER = Path(__file__).parent
SEED = 0
TARGET_ROWS = 8  # the other bookings are test rows

# source -> rows in the pool, duplicates included
SOURCES = {
    "facts": 44,
    "words": 36,
    "arithmetic": 32,
    "grammar": 28,
    "records": 24,
    "reviews": 20,
    "notes": 16,
    "calendar": 14,
    "lists": 10,
    "units": 8,
    "code": 8,
}

MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)
MONEY = {
    "EUR": ("{} euros", "€{}"),
    "USD": ("{} dollars", "${}"),
    "GBP": ("{} pounds", "£{}"),
    "CHF": ("{} francs", "{} Swiss francs"),
    "JPY": ("{} yen", "¥{}"),
}


@dataclass(frozen=True, slots=True)
class Example:
    """One user and one assistant turn; `relevant` pool examples teach the target's skill."""

    source: str
    user: str
    answer: str
    relevant: bool = False
    subtask: str | None = None


@dataclass(frozen=True, slots=True)
class Booking:
    """A place, a day and a price, in whole units of the currency."""

    city: str
    day: int
    month: int
    cost: int
    currency: str

    def tell(self, sentence: str, style: int) -> str:
        """The sentence with its {c}, {d} and {p} filled in; style chooses how date and price are written."""
        ending = "th" if 10 < self.day < 14 else {1: "st", 2: "nd", 3: "rd"}.get(self.day % 10, "th")
        month = MONTHS[self.month - 1]
        date = (f"{self.day} {month}", f"{month} {self.day}", f"{self.day}{ending} {month}")[style % 3]
        price = MONEY[self.currency][style % 2].format(self.cost)
        told = sentence.replace("{c}", self.city).replace("{d}", date).replace("{p}", price)
        return told[0].upper() + told[1:]

    @property
    def line(self) -> str:
        """The house style that the target asks for."""
        return f"city: {self.city} | day: {self.day} {MONTHS[self.month - 1][:3]} | cost: {self.cost} {self.currency}"


def _bookings(cities: Sequence[tuple[str, str]], n: int, start: int) -> list[Booking]:
    """N bookings that run through the cities; day and month repeat after 84 of them, the cost after 73."""
    result = []
    for i in range(start, start + n):
        city, currency = cities[i % len(cities)]
        cost = (21 + i * 31 % 73) * (100 if currency == "JPY" else 1)
        result.append(Booking(city, 1 + i * 11 % 28, 1 + i * 5 % 12, cost, currency))
    return result


def _asked(wordings: Sequence[str], items: Iterable[str]) -> list[str]:
    """Every item inside one of the wordings, in turn."""
    return [wordings[i % len(wordings)].replace("{}", item) for i, item in enumerate(items)]


def _examples(source: str, wordings: Sequence[str], pairs: Sequence[tuple[str, str]]) -> list[Example]:
    asked = _asked(wordings, (item for item, _ in pairs))
    return [Example(source, user, answer) for user, (_, answer) in zip(asked, pairs, strict=True)]


# ------------------------------------------------------------------------------------------------------------ bookings

POOL_CITIES = (
    ("Porto", "EUR"),
    ("Leeds", "GBP"),
    ("Boston", "USD"),
    ("Basel", "CHF"),
    ("Osaka", "JPY"),
    ("Ghent", "EUR"),
    ("Bath", "GBP"),
    ("Denver", "USD"),
    ("Bern", "CHF"),
    ("Nara", "JPY"),
    ("Lille", "EUR"),
    ("Cork", "EUR"),
    ("Austin", "USD"),
    ("Utrecht", "EUR"),
    ("York", "GBP"),
    ("Kobe", "JPY"),
    ("Turin", "EUR"),
    ("Tampa", "USD"),
    ("Geneva", "CHF"),
    ("Graz", "EUR"),
    ("Faro", "EUR"),
    ("Durham", "GBP"),
    ("Bari", "EUR"),
    ("Nice", "EUR"),
)
TARGET_CITIES = (
    ("Lyon", "EUR"),
    ("Chicago", "USD"),
    ("Vienna", "EUR"),
    ("Tokyo", "JPY"),
    ("Bristol", "GBP"),
    ("Zurich", "CHF"),
    ("Athens", "EUR"),
    ("Seattle", "USD"),
    ("Madrid", "EUR"),
    ("Kyoto", "JPY"),
    ("Oxford", "GBP"),
    ("Lugano", "CHF"),
    ("Naples", "EUR"),
    ("Miami", "USD"),
    ("Berlin", "EUR"),
    ("Glasgow", "GBP"),
    ("Dublin", "EUR"),
    ("Dallas", "USD"),
    ("Tallinn", "EUR"),
    ("Sapporo", "JPY"),
    ("Cardiff", "GBP"),
    ("Lucerne", "CHF"),
    ("Helsinki", "EUR"),
)

# source -> (wordings, sentences) of the pool rows that teach the target's line
RELEVANT = {
    "records": (
        ("As a row of our table: {}", "{}\nRewrite that as a table row.", "Table row, please. {}"),
        (
            "Sofia rented a flat in {c} for {p}, keys on {d}.",
            "A guided walk in {c} costs {p}, on {d}.",
            "Paid {p} for the ferry that reaches {c} on {d}.",
            "The {c} workshop starts on {d} and the fee is {p}.",
            "Our coach stops in {c} on {d}; lunch {p}.",
            "Museum passes for {c}, {p} together, valid from {d}.",
            "Grandad's hostel bed in {c} came to {p} for {d}.",
            "Dinner cruise, {c}, {d}, {p} a head.",
            "For {p} you can see the match in {c} on {d}.",
            "Rental van in {c} from {d}, {p} a day.",
        ),
    ),
    "notes": (
        ("Boil down to our standard note: {}", "{}\nStandard short note:", "Note for the folder: {}"),
        (
            "The choir sings in {c} on {d}, entry {p}.",
            "Mum says the cabin near {c} is ours from {d} for {p}.",
            "We owe {p} for the camp site at {c}, arriving {d}.",
            "The dentist in {c} can see you on {d} for {p}.",
            "Our stall at the {c} fair on {d} costs {p}.",
            "Bikes in {c} on {d} for {p}.",
            "The sleeper gets us into {c} on {d}, berth {p}.",
            "Lena's pottery class is in {c} on {d}, fee {p}.",
        ),
    ),
    "calendar": (
        ("Put this in the diary: {}", "Diary line for this? {}"),
        (
            "chess final, {c}, {d}, entry {p}",
            "on {d} the tour of {c} Castle, {p} each",
            "boat trip off {c} costing {p}, {d}",
            "yoga weekend in {c}, {p}, from {d}",
            "{c} marathon, {d}, start fee {p}",
            "lecture in {c} on {d}; the door takes {p}",
        ),
    ),
}

TARGET_WORDINGS = (
    "Log this booking. {}",
    "{} File it the usual way.",
    "Make our usual entry: {}",
    "How to register this? {}",
    "{}\nEntry:",
    "Take this down: {}",
)
# subtask -> sentences
TARGET_SENTENCES = {
    "stay": (
        "Two nights at a hotel in {c} from {d}, {p} in all.",
        "I booked a double room in {c} for {d} at {p}.",
        "The {c} guest house wants {p} for the night of {d}.",
        "Single room, breakfast included, {c}, {d}, {p}.",
        "Our inn at {c} is confirmed for {d} at {p}.",
        "Reserve the family suite in {c}, check-in {d}, {p}.",
        "Check-in is {d} in {c}, and the bill will be {p}.",
        "She has an airport hotel in {c} on {d}, {p}.",
        "{p} buys one night in central {c} on {d}.",
        "They hold a twin room in {c} until {d}, deposit {p}.",
        "A week in {c} beginning {d} is {p} with meals.",
        "Mr Hale stays in {c} on {d}; his room costs {p}.",
        "We got the attic room in {c}, {d}, for just {p}.",
        "Late arrival in {c} on {d}, hotel already paid, {p}.",
        "Confirmed: {c}, one room, {d}, total {p}.",
        "The lodge outside {c} takes us on {d} and asks {p}.",
        "From {d} I have a sea-view room in {c} at {p}.",
        "Keep the {c} apartment for us on {d}, {p}.",
        "The team hotel in {c} is {p} per night from {d}.",
        "Room 12 in {c} is mine on {d}; I paid {p}.",
        "Anna moved her stay in {c} to {d}, still {p}.",
        "An extra night in {c}, {d}, adds {p}.",
        "Half board in {c} from {d} comes to {p}.",
        "Cheapest bed in {c} for {d} was {p}.",
    ),
    "ticket": (
        "Morning flight to {c} on {d}, {p} with one bag.",
        "I bought a train ticket to {c} for {d}, {p}.",
        "Return fare to {c} is {p}, leaving {d}.",
        "Window seat on the express to {c}, {d}, {p}.",
        "The night bus to {c} on {d} costs {p}.",
        "We fly home to {c} on {d}; seats were {p} each.",
        "{p} for the {d} train into {c}.",
        "Tom changed his {c} flight to {d} and paid {p}.",
        "First class to {c}, {d}, upgrade included, {p}.",
        "My plane lands in {c} on {d}; the fare was {p}.",
        "Two rail tickets, {c}, {d}, {p} together.",
        "Travelling to {c} by coach on {d} for {p}.",
        "A one-way ticket to {c} dated {d} was {p}.",
        "The last seat to {c} on {d} went for {p}.",
        "Departure {d}, destination {c}, price {p}.",
        "Her connection through {c} on {d} came at {p}.",
        "Group fare to {c}, {d}: {p}.",
        "Going to {c} on {d} with the fast train, {p}.",
        "The airline offers {c} on {d} for {p}.",
        "Standby flight, {c}, {d}, {p} at the gate.",
        "Student ticket to {c}, {p}, valid on {d}.",
        "He leaves for {c} on {d}, ticket price {p}.",
        "Airport shuttle into {c} on {d}, {p} per person.",
        "Seat 4A to {c}, {d}, paid {p}.",
    ),
}


def _relevant(source: str, start: int) -> list[Example]:
    wordings, sentences = RELEVANT[source]
    bookings = _bookings(POOL_CITIES, len(sentences), start)
    told = [booking.tell(sentence, i) for i, (booking, sentence) in enumerate(zip(bookings, sentences, strict=True))]
    asked = _asked(wordings, told)
    return [Example(source, u, b.line, relevant=True) for u, b in zip(asked, bookings, strict=True)]


def _bookings_target() -> list[Example]:
    """The target's and the test's examples: each sentence once, six wordings in turn."""
    result: list[Example] = []
    for subtask, sentences in TARGET_SENTENCES.items():
        start = 26 + len(result)  # after the pool's relevant rows, so that no date and price of theirs comes back
        bookings = _bookings(TARGET_CITIES, len(sentences), start)
        for i, (booking, sentence) in enumerate(zip(bookings, sentences, strict=True)):
            # i + i // 6 moves the date's style against the wording, which also repeats every six rows
            user = TARGET_WORDINGS[(i + start) % 6].replace("{}", booking.tell(sentence, i + i // 6))
            result.append(Example("bookings", user, booking.line, subtask=subtask))
    return result


# ------------------------------------------------------------------------------------------------- the rest of the pool


def _facts() -> list[Example]:
    terms = (
        ("a glacier", "A glacier is a thick mass of ice that forms from packed snow and creeps downhill."),
        ("an estuary", "An estuary is where a river meets the sea and fresh water mixes with salt water."),
        ("photosynthesis", "It is how plants use sunlight to make sugar from water and carbon dioxide."),
        ("a catalyst", "A catalyst speeds up a chemical reaction without being used up itself."),
        ("a tariff", "A tariff is a tax on goods that come in from another country."),
        ("a sonnet", "A sonnet is a poem of fourteen lines, usually with a fixed rhyme scheme."),
        ("inertia", "Things keep resting or moving as they are until a force acts on them. That is inertia."),
        ("a peninsula", "A peninsula is land with water on most sides that still joins the mainland."),
        ("evaporation", "Evaporation is a liquid turning into gas at its surface, even below the boiling point."),
        ("a quorum", "A quorum is the smallest number of members who must be present for a valid vote."),
        ("an algorithm", "An algorithm is a finite list of clear steps that solves a problem."),
        ("a mortgage", "A mortgage is a loan for which the house or land stands as security."),
        ("compost", "Compost is rotted plant waste that gardeners dig in to feed the soil."),
        ("a solstice", "A solstice is a moment in the year when the day is at its longest or its shortest."),
        ("a prime number", "A prime is a whole number above one that only one and itself divide."),
        ("osmosis", "Osmosis is water passing through a thin membrane towards the more concentrated side."),
        ("a fjord", "A fjord is a long, narrow arm of the sea between steep cliffs, carved by ice."),
        ("a veto", "A veto is the power to stop a decision that others have agreed on."),
        ("an isotope", "Isotopes of an element differ only in the number of neutrons in their atoms."),
        ("a haiku", "A haiku is a Japanese poem, in English often three lines of five, seven and five syllables."),
        ("a delta", "A delta is the land a river builds from mud and sand where it slows at its mouth."),
        ("erosion", "Erosion is the wearing away of rock and soil by water, wind or ice."),
    )
    animals = (
        ("newt", "Amphibian. It lives partly in water and partly on land."),
        ("bat", "Mammal. It has fur and feeds its young with milk."),
        ("gecko", "Reptile. It has scales and lays its eggs on land."),
        ("dragonfly", "Insect. It has six legs and two pairs of wings."),
        ("seahorse", "Fish. It breathes with gills in spite of its odd shape."),
        ("penguin", "Bird. It has feathers and lays eggs, though it cannot fly."),
    )
    kingdoms = (
        ("quartz", "Mineral: it is a crystal found in many rocks."),
        ("moss", "Plant: it makes its food from light."),
        ("a coral", "Animal: tiny polyps build the reef."),
        ("bamboo", "Plant: it is a giant grass."),
        ("a sea sponge", "Animal: it filters its food out of the water."),
    )
    kitchen = (
        ("carrot", "You eat its root."),
        ("spinach", "You eat its leaves."),
        ("cucumber", "You eat its fruit, seeds included."),
        ("beetroot", "Mostly its root, though the leaves taste good too."),
        ("fig", "You eat the fruit, fresh or dried."),
    )
    instruments = (
        ("An oboe", "Wind, since the player blows through a double reed."),
        ("A cello", "Strings, since a bow makes its four strings sound."),
        ("A kettledrum", "Percussion, since the player strikes a skin."),
        ("A xylophone", "Percussion, since mallets hit wooden bars."),
        ("A harp", "Strings, since the fingers pluck them."),
    )
    wordings = (
        "What is {}?",
        "Define in one sentence: {}",
        "Explain {} to a child.",
        "What do people mean by {}?",
        "Quick definition of {}, please.",
    )
    return [
        *_examples("facts", wordings, terms),
        *_examples("facts", ("Mammal, bird, fish, reptile, amphibian or insect: what is a {}?",), animals),
        *_examples("facts", ("Animal, plant or mineral? I am thinking of {}.",), kingdoms),
        *_examples("facts", ("Which part of the {} plant ends up in the kitchen?",), kitchen),
        *_examples("facts", ("{}: strings, wind or percussion? Say why.",), instruments),
    ]


def _words() -> list[Example]:
    synonyms = (
        ("brisk", "Lively. The lively market filled up before noon."),
        ("weary", "Tired. The tired porters sat down on their crates."),
        ("huge", "Vast. A vast field of barley lay behind the barn."),
        ("begin", "Start. The players start as soon as the rain stops."),
        ("quiet", "Silent. The silent hall made every step sound loud."),
        ("repair", "Mend. My uncle can mend a clock with a hairpin."),
        ("clever", "Smart. A smart crow dropped the nut on the road."),
        ("shout", "Yell. Do not yell across the reading room."),
    )
    opposites = (
        ("generous", "The opposite is stingy, said of someone who hates to share."),
        ("ancient", "The opposite is modern, said of what belongs to our time."),
        ("shallow", "The opposite is deep, as in a deep well."),
        ("arrive", "The opposite is depart, as a ship departs at high tide."),
        ("scarce", "The opposite is plentiful, as plums are in August."),
        ("rough", "The opposite is smooth, like a pebble from a stream."),
        ("expand", "The opposite is shrink, as wool does in hot water."),
        ("timid", "The opposite is bold, like a robin on the doorstep."),
    )
    odd = (
        ("lemon, hammer, plum, grape", "Hammer. The others are fruit."),
        ("trout, salmon, herring, sparrow", "Sparrow. The others are fish."),
        ("violin, sofa, stool, bench", "Violin. The others are seats."),
        ("oak, birch, tulip, maple", "Tulip. The others are trees."),
        ("hotel, hostel, ticket, inn", "Ticket. The others are places to sleep."),
        ("copper, zinc, cotton, iron", "Cotton. The others are metals."),
    )
    groups = (
        ("wolves", "A group of wolves is called a pack."),
        ("sheep", "A group of sheep is called a flock."),
        ("bees", "Bees live together in a swarm or a colony."),
        ("lions", "A group of lions is called a pride."),
        ("whales", "Whales that swim together form a pod."),
    )
    plurals = (
        ("knife", "Two knives lay beside the bread."),
        ("goose", "Three geese blocked the path."),
        ("tooth", "The baby has four teeth now."),
        ("city", "Both cities lie on the same river."),
    )
    rhymes = (
        ("light", "Night, kite and bright all rhyme with it."),
        ("stone", "Bone, phone and alone all rhyme with it."),
        ("day", "Play, grey and delay all rhyme with it."),
        ("cost", "Lost, frost and tossed all rhyme with it."),
    )
    return [
        *_examples(
            "words",
            ("Give one synonym of '{}' and use it in a sentence.", "Another word for '{}', with an example?"),
            synonyms,
        ),
        *_examples("words", ("What is the opposite of '{}'?", "Name an antonym: {}"), opposites),
        *_examples("words", ("Which word is the odd one out: {}?",), odd),
        *_examples("words", ("What do you call a group of {}?",), groups),
        *_examples("words", ("Write a short sentence with the plural of '{}'.",), plurals),
        *_examples("words", ("Three words that rhyme with '{}'?",), rhymes),
    ]


def _arithmetic() -> list[Example]:
    result: list[tuple[str, str]] = []
    for what, n, each, paid in (
        ("ferry tickets", 3, 14, 50),
        ("pens", 6, 2, 20),
        ("train tickets", 4, 9, 40),
        ("cinema seats", 5, 11, 60),
    ):
        result.append(
            (
                f"I buy {n} {what} at {each} euros each and pay with {paid}. What change is due?",
                f"{n} x {each} = {n * each}, and {paid} - {n * each} = {paid - n * each} euros.",
            )
        )
    for thing, box, n, each, broken in (
        ("eggs", "cartons", 7, 12, 5),
        ("tiles", "crates", 8, 15, 9),
        ("plates", "stacks", 6, 20, 4),
        ("bulbs", "trays", 9, 10, 13),
    ):
        result.append(
            (
                f"{n} {box} hold {each} {thing} each, but {broken} broke. How many are whole?",
                f"{n} x {each} = {n * each}; without the broken ones {n * each - broken} are left.",
            )
        )
    for vehicle, speed, hours in (("train", 95, 3), ("cyclist", 18, 4), ("coach", 70, 5), ("ship", 26, 6)):
        result.append(
            (
                f"A {vehicle} moves at {speed} km per hour. How far does it get in {hours} hours?",
                f"Distance is speed times time: {speed} x {hours} = {speed * hours} km.",
            )
        )
    for n, bill, tip in ((4, 92, 3), (3, 75, 2), (5, 140, 4), (6, 78, 1)):
        result.append(
            (
                f"{n} guests share a bill of {bill} dollars and each adds a tip of {tip}. What does one pay?",
                f"{bill} / {n} = {bill // n}, plus {tip} makes {bill // n + tip} dollars.",
            )
        )
    for percent, whole in ((15, 60), (20, 45), (35, 80), (5, 240)):
        result.append(
            (
                f"What is {percent} percent of {whole}?",
                f"One percent of {whole} is {whole / 100:g}, so {percent} percent is "
                f"{percent} x {whole / 100:g} = {Fraction(percent * whole, 100)}.",
            )
        )
    for place, a, b in (("garden", 12, 7), ("carpet", 5, 3), ("pool", 25, 10), ("poster", 9, 6)):
        result.append(
            (
                f"How long is a ribbon around a {place} that measures {a} by {b} metres?",
                f"Add the sides and double: 2 x ({a} + {b}) = {2 * (a + b)} metres.",
            )
        )
    for n, unit, one, factor, small in (
        (4, "kilograms", "kilogram", 1000, "grams"),
        (7, "hours", "hour", 60, "minutes"),
        (3, "metres", "metre", 100, "centimetres"),
        (5, "weeks", "week", 7, "days"),
    ):
        result.append(
            (
                f"How many {small} are in {n} {unit}?",
                f"One {one} has {factor} {small}, so {n} x {factor} = {n * factor} {small}.",
            )
        )
    for colour, a, other, b in (
        ("red", 4, "green", 8),
        ("white", 6, "black", 9),
        ("blue", 10, "pink", 15),
        ("gold", 3, "grey", 21),
    ):
        result.append(
            (
                f"A bag has {a} {colour} and {b} {other} beads. What fraction is {colour}?",
                f"There are {a + b} beads, and {a}/{a + b} is {Fraction(a, a + b)} in lowest terms.",
            )
        )
    return [Example("arithmetic", user, answer) for user, answer in result]


def _grammar() -> list[Example]:
    past = (
        ("The baker opens his shop at six.", "The baker opened his shop at six."),
        ("We book two rooms in Vienna.", "We booked two rooms in Vienna."),
        ("They swim across the lake.", "They swam across the lake."),
        ("My train leaves without me.", "My train left without me."),
        ("She writes to the hotel in Athens.", "She wrote to the hotel in Athens."),
        ("The dog hides under the stairs.", "The dog hid under the stairs."),
        ("I pay the driver and take my bag.", "I paid the driver and took my bag."),
        ("The wind blows the hats away.", "The wind blew the hats away."),
        ("He flies to Madrid on Monday.", "He flew to Madrid on Monday."),
    )
    passive = (
        ("The cat chased the mouse.", "The mouse was chased by the cat."),
        ("A guide showed us the old town.", "We were shown the old town by a guide."),
        ("The clerk stamps every ticket.", "Every ticket is stamped by the clerk."),
        ("Storms damaged the harbour wall.", "The harbour wall was damaged by storms."),
        ("The cook has burned the rice.", "The rice has been burned by the cook."),
        ("A farmer will sell the barn.", "The barn will be sold by a farmer."),
        ("The hotel charged us twice.", "We were charged twice by the hotel."),
    )
    questions = (
        ("The museum closes early.", "Does the museum close early?"),
        ("You have seen my keys.", "Have you seen my keys?"),
        ("The fare to Dublin went up.", "Did the fare to Dublin go up?"),
        ("They are waiting at the gate.", "Are they waiting at the gate?"),
        ("Rita can read music.", "Can Rita read music?"),
    )
    errors = (
        ("Me and him goes fishing.", "He and I go fishing. (subject form, plural verb)"),
        ("She don't like tea.", "She doesn't like tea. (third person)"),
        ("There is many boats.", "There are many boats. (plural verb)"),
        ("I have went home.", "I have gone home. (participle)"),
        ("This room is more cheaper.", "This room is cheaper. (one comparative is enough)"),
        ("Their is a leak in the roof.", "There is a leak in the roof. (spelling)"),
    )
    return [
        *_examples("grammar", ("Put into the past tense: {}", "{}\nSay that it happened yesterday."), past),
        *_examples("grammar", ("Rewrite in the passive voice: {}", "{} (active to passive)"), passive),
        *_examples("grammar", ("Make a yes-or-no question of this: {}",), questions),
        *_examples("grammar", ("Correct the mistake: {}",), errors),
    ]


def _json_line(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _decoys(sentences: Sequence[str], start: int) -> list[tuple[str, Booking]]:
    """Bookings told of the target's own cities, for rows that answer in another form."""
    bookings = _bookings(TARGET_CITIES, len(sentences), start)
    return [(b.tell(s, i + 1), b) for i, (b, s) in enumerate(zip(bookings, sentences, strict=True))]


def _date(booking: Booking) -> str:
    return f"{booking.day} {MONTHS[booking.month - 1]}"


def _price(booking: Booking) -> str:
    return MONEY[booking.currency][0].format(booking.cost)


def _records() -> list[Example]:
    told = _decoys(
        (
            "Room in {c}, {d}, {p}.",
            "Flight to {c} on {d}, {p}.",
            "Hotel in {c} from {d} for {p}.",
            "Train to {c}, {d}, {p}.",
        ),
        74,
    )
    as_json = [(text, _json_line({"city": b.city, "cost": b.cost, "day": b.day})) for text, b in told]
    people = [
        ("name Ines Roth, age 41, job welder", _json_line({"name": "Ines Roth", "age": 41, "job": "welder"})),
        ("product mug, colour teal, stock 18", _json_line({"product": "mug", "colour": "teal", "stock": 18})),
        ("title Low Tide, pages 212, lent no", _json_line({"title": "Low Tide", "pages": 212, "lent": False})),
    ]
    (where, a), (when, b), (price, c), (where2, d) = _decoys(
        (
            "We stay at an inn in {c} on {d} for {p}.",
            "Ticket to {c}, {p}, valid on {d}.",
            "Hotel booking: {c}, {d}, {p} with breakfast.",
            "Your seat to {c} on {d} has been paid, {p}.",
        ),
        78,
    )
    fields = [
        (f"{where}\nWhich city is this?", f"The city is {a.city}."),
        (f"{when}\nWhat day can I use it?", f"The day is {_date(b)}."),
        (f"{price}\nWhat is the cost?", f"The cost is {_price(c)}."),
        (f"Where does the seat take me? {where2}", f"It takes you to the city of {d.city}."),
        ("Find the e-mail address: write to Olga at olga@example.org before noon.", "olga@example.org"),
        ("Invoice 7731 from Bell and Sons is due in May. What is its number?", "The invoice number is 7731."),
        ("Call me on extension 52 or ask for Mr Otto. Who should be asked for?", "Mr Otto should be asked for."),
    ]
    return [
        *_relevant("records", 0),
        *_examples("records", ("Log this booking as JSON. {}", "{} File it as JSON."), as_json),
        *_examples("records", ("Write as JSON: {}",), people),
        *[Example("records", user, answer) for user, answer in fields],
    ]


def _reviews() -> list[Example]:
    labels = (
        ("The room was spotless and the staff remembered our names.", "Positive: clean and friendly."),
        ("Our train to Lyon was late, loud and freezing.", "Negative: late, noisy, cold."),
        ("Great soup, but we waited an hour for it.", "Mixed: good food, slow service."),
        ("The lamp broke on its second evening.", "Negative: it did not last."),
        ("I read the whole book in one night.", "Positive: it held the reader."),
        ("A fair price, yet the walls are paper thin.", "Mixed: cheap but noisy."),
        ("Best hotel in Naples, and worth the cost.", "Positive: praised and worth it."),
        ("The headphones hiss, and nobody answers my mails.", "Negative: bad sound, no help."),
        ("My boots stayed dry all winter.", "Positive: they keep water out."),
        ("Lovely garden, dull menu.", "Mixed: the place pleases, the food does not."),
    )
    stars = (
        ("Booking took a minute and the seat was wide.", "5 stars. Quick and comfortable."),
        ("The pillow smelled of smoke and the shower leaked.", "1 star. Dirty and broken."),
        ("It works, no more and no less.", "3 stars. Plainly average."),
        ("The guide in Kyoto made every temple come alive.", "5 stars. An inspiring guide."),
        ("Small cracks after a month, but still usable.", "2 stars. Wears out early."),
    )
    moods = (
        ("They charged me for a ticket that I never bought!", "Angry. The writer was billed wrongly."),
        ("I keep smiling at that little teapot.", "Happy. The writer loves the teapot."),
        ("I hoped for more from a city this famous.", "Disappointed. The city fell short."),
        ("No idea which cable goes where.", "Confused. The writer needs instructions."),
    )
    asked = ("Positive, negative or mixed? {}", "Sentiment of this review, with a reason: {}")
    return [
        *_examples("reviews", asked, labels),
        *_examples("reviews", ("How many stars from one to five would this guest give? {}",), stars),
        *_examples("reviews", ("What is the customer's mood? {}",), moods),
    ]


LONG_USER = (
    "Sum up the meeting in one sentence.\n"
    "The allotment club met on Tuesday in the old school. Mrs Quill reported that the pump had failed twice in the "
    "dry weeks and that carrying water from the canal was too much for the older members. Ben had asked three firms "
    "about a new pump; the cheapest wanted four hundred pounds, and the club has two hundred and sixty. Somebody "
    "proposed a plant sale, somebody else a raffle, and after half an hour of debate nearly all hands went up for "
    "the sale. Farah offered two trays of tomato seedlings, the Lowes promised to bake, and the school will lend "
    "its tables if they are back before Monday. The sale is on the second Saturday of May, from ten until the last "
    "pot is gone. Until then everybody takes turns at the canal, two cans each, and the rota hangs on the shed "
    "door. The meeting closed with tea."
)
LONG_ANSWER = (
    "The club will hold a plant sale on the second Saturday of May to pay for a new pump, and until then members "
    "will take turns to fetch water from the canal."
)


def _notes() -> list[Example]:
    told = _decoys(
        (
            "I reserved a hotel room in {c} for {d} at {p}.",
            "My flight to {c} is on {d} and cost {p}.",
            "From {d} we have an apartment in {c} at {p}.",
            "The ticket to {c} on {d} was {p} in all.",
        ),
        82,
    )
    shapes = (
        "A room in the city of {c}, cost {p}, {d}.",
        "A flight to {c} on that day, {d}, for {p}.",
        "{d} is the first day of a stay in {c}; the cost is {p}.",
        "Going to {c} cost {p}; the day is {d}.",
    )
    trips = []
    for (text, b), shape in zip(told, shapes, strict=True):
        answer = shape.replace("{c}", b.city).replace("{d}", _date(b)).replace("{p}", _price(b))
        trips.append((text, answer))
    other = (
        ("The lift is stuck again and the repair man comes at four.", "The lift will be repaired at four."),
        ("Because of the snow there is no school, and the bus stays in the depot too.", "Snow stops school and bus."),
        ("Keys are under the pot, the cat eats at seven, thanks a lot!", "Fetch the keys and feed the cat at seven."),
    )
    return [
        *_relevant("notes", 10),
        *_examples("notes", ("Say this booking in short. {}", "{} Please shorten it."), trips),
        *_examples("notes", ("Shorten to half: {}",), other),
        Example("notes", LONG_USER, LONG_ANSWER),
    ]


def _calendar() -> list[Example]:
    clock = []
    for text, hour, minute in (
        ("9:40 in the evening", 21, 40),
        ("twenty past three in the afternoon", 15, 20),
        ("half past midnight", 0, 30),
        ("quarter to eight in the morning", 7, 45),
    ):
        clock.append((text, f"{hour:02d}:{minute:02d}"))
    spans = []
    for event, start, end in (
        ("The film", 1150, 1275),
        ("The flight to Miami", 515, 700),
        ("A lesson", 830, 875),
        ("The night bus", 1395, 1490),
    ):
        first, last = (f"{minutes // 60 % 24:02d}:{minutes % 60:02d}" for minutes in (start, end))
        hours, rest = divmod(end - start, 60)
        length = f"{hours} h {rest} min" if hours else f"{rest} min"
        spans.append((f"{event} runs from {first} to {last}. How long is that?", f"It takes {length}."))
    return [
        *_relevant("calendar", 18),
        *_examples("calendar", ("Write as a 24-hour time: {}",), clock),
        *[Example("calendar", user, answer) for user, answer in spans],
    ]


def _lists() -> list[Example]:
    jobs: tuple[tuple[str, list[str], Callable[[list[str]], list[str]]], ...] = (
        ("Sort by alphabet: {}", ["Vienna", "Lyon", "Tokyo", "Berlin"], sorted),
        ("Sort by alphabet: {}", ["walnut", "acorn", "hazel", "pecan"], sorted),
        ("Order from small to large: {}", ["31", "7", "104", "58"], lambda x: sorted(x, key=int)),
        ("Order from small to large: {}", ["9", "90", "19", "91"], lambda x: sorted(x, key=int)),
        ("Shortest word first: {}", ["lantern", "cup", "basket", "oven"], lambda x: sorted(x, key=len)),
        ("Shortest word first: {}", ["ticket", "city", "passport", "bag"], lambda x: sorted(x, key=len)),
        ("Turn the list around: {}", ["north", "east", "south", "west"], lambda x: x[::-1]),
        ("Turn the list around: {}", ["check-in", "dinner", "sleep", "breakfast"], lambda x: x[::-1]),
        ("Drop what is repeated: {}", ["ham", "egg", "ham", "rye", "egg"], lambda x: list(dict.fromkeys(x))),
        ("Put these months in order: {}", ["May", "January", "October"], lambda x: sorted(x, key=MONTHS.index)),
    )
    return [Example("lists", ask.replace("{}", ", ".join(x)), ", ".join(key(x))) for ask, x, key in jobs]


def _units() -> list[Example]:
    result = []
    for n, unit, rate, other in (
        (5, "miles", Fraction("1.6"), "km"),
        (10, "inches", Fraction("2.54"), "cm"),
        (8, "pounds", Fraction("0.45"), "kg"),
        (6, "pints", Fraction("0.57"), "litres"),
    ):
        result.append(
            (
                f"Convert {n} {unit} to {other}; use {float(rate):g} for one.",
                f"{n} * {float(rate):g} = {float(n * rate):g} {other}",
            )
        )
    result += [
        (f"{f} degrees Fahrenheit in Celsius?", f"({f} - 32) * 5 / 9 = {(f - 32) * 5 // 9} Celsius")
        for f in (68, 95, 50)
    ]
    return [Example("units", user, answer) for user, answer in result]


def _code() -> list[Example]:
    return [
        Example("code", user, answer)
        for user, answer in (
            ("Python: reverse the string s.", "s[::-1]  # a slice with step -1"),
            ("One line of Python for the squares of 1 to 9.", "squares = [n * n for n in range(1, 10)]"),
            ("Count the lines of notes.txt in a shell.", "wc -l notes.txt"),
            ("SQL: names of all people older than 30.", "SELECT name FROM people WHERE age > 30;"),
            ("Python: sort the list words by length.", "words.sort(key=len)  # short ones first"),
            (
                "How do I load a JSON file in Python?",
                "import json\nwith open(path) as file:\n    data = json.load(file)",
            ),
            ("Python: drop repeated items of xs but keep their order.", "list(dict.fromkeys(xs))"),
            ("JavaScript: the last item of an array a.", "a[a.length - 1]  // or a.at(-1)"),
        )
    ]


def _duplicates(examples: Sequence[Example]) -> list[Example]:
    """Five rows that say again what an earlier one says: three exactly (one of them spaced out), two nearly."""

    def find(start: str) -> Example:
        (found,) = (e for e in examples if e.user.startswith(start))
        return found

    glacier, bees = find("What is a glacier?"), find("What do you call a group of bees?")
    weeks, guide = find("How many days are in 5 weeks?"), find("A guide showed us")
    guest = find("How many stars from one to five would this guest give? The pillow")
    return [
        glacier,
        replace(bees, user=bees.user.replace(" group of", "  group of")),
        replace(weeks, source="units"),
        replace(guide, answer=guide.answer.rstrip(".")),
        replace(guest, answer=guest.answer.replace("broken.", "broken!")),
    ]


# ----------------------------------------------------------------------------------------------------- the three files


def _shuffled(examples: Iterable[Example], name: str) -> list[Example]:
    """In the order of a hash of the seed, the name and the text; equal texts differ by their place in the input."""

    def key(item: tuple[int, Example]) -> bytes:
        i, e = item
        return hashlib.blake2b(f"{SEED}\0{name}\0{i}\0{e.user}\0{e.answer}".encode(), digest_size=16).digest()

    return [e for _, e in sorted(enumerate(examples), key=key)]


def _numbered(examples: Iterable[Example], name: str | None = None) -> dict[str, Example]:
    """Ids NAME-001, NAME-002, ... in the given order; by source without a name."""
    counts: dict[str, int] = {}
    result = {}
    for e in examples:
        prefix = name or e.source
        counts[prefix] = counts.get(prefix, 0) + 1
        result[f"{prefix}-{counts[prefix]:03d}"] = e
    return result


@cache
def _pool() -> dict[str, Example]:
    parts = (_facts, _words, _arithmetic, _grammar, _records, _reviews, _notes, _calendar, _lists, _units, _code)
    examples = [e for part in parts for e in part()]
    pool = _numbered(_shuffled([*examples, *_duplicates(examples)], "pool"))
    counts = {source: sum(e.source == source for e in pool.values()) for source in SOURCES}
    assert counts == SOURCES, f"pool rows by source: {counts}"
    return pool


def _target_and_test() -> tuple[dict[str, Example], dict[str, Example]]:
    """Target rows are the first of each subtask in hash order, in equal numbers; all others are test rows."""
    target: list[Example] = []
    test: list[Example] = []
    for subtask in TARGET_SENTENCES:
        rows = _shuffled((e for e in _bookings_target() if e.subtask == subtask), subtask)
        n = TARGET_ROWS // len(TARGET_SENTENCES)
        target += rows[:n]
        test += rows[n:]
    return _numbered(_shuffled(target, "target"), "target"), _numbered(_shuffled(test, "test"), "test")


def _jsonl(rows: dict[str, Example]) -> bytes:
    lines = []
    for name, e in rows.items():
        messages = [{"role": "user", "content": e.user}, {"role": "assistant", "content": e.answer}]
        row: dict[str, object] = {"dataset": e.source, "id": name, "messages": messages}
        if e.subtask is not None:
            row["subtask"] = e.subtask
        lines.append(_json_line(row) + "\n")
    return "".join(lines).encode()


def relevant_ids() -> frozenset[str]:
    """The ids of the 24 pool rows that answer in the target's format: the truth a selection can be judged by."""
    return frozenset(name for name, e in _pool().items() if e.relevant)


def contents() -> dict[str, bytes]:
    """File name -> its bytes, UTF-8 JSON lines."""
    target, test = _target_and_test()
    return {"pool.jsonl": _jsonl(_pool()), "target.jsonl": _jsonl(target), "test.jsonl": _jsonl(test)}


def write(folder: Path = FOLDER) -> None:
    """Write the three files into the folder, replacing older ones."""
    for name, data in contents().items():
        files.write_bytes(folder / name, data)


def copy(folder: Path) -> None:
    """Write the rows under the names that the READMEs use: pool.jsonl, dev.jsonl (the target) and test.jsonl.

    Raises: UsageError for a file that is there already, before any is written.
    """
    named = {name.replace("target", "dev"): data for name, data in contents().items()}
    folder = files.make_folder(folder)
    if there := [name for name in named if (folder / name).exists()]:
        raise UsageError(f"{folder / there[0]} is there already; move it, or name another folder")
    for name, data in named.items():
        files.write_bytes(folder / name, data)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        write()
    elif len(sys.argv) == 2 and not sys.argv[1].startswith("-"):
        try:
            copy(Path(sys.argv[1]))
        except DatatoolsError as error:
            sys.exit(f"error: {error}")
    else:
        sys.exit("usage: python -m pipelines.demo_data.make [FOLDER]")
