"""The larger sources of the demo's pool: facts, words, arithmetic and grammar."""

from fractions import Fraction

from pipelines.demo_data.examples import Example, make_examples


def facts_rows() -> list[Example]:
    """The rows of the source `facts`."""
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
        *make_examples("facts", wordings, terms),
        *make_examples("facts", ("Mammal, bird, fish, reptile, amphibian or insect: what is a {}?",), animals),
        *make_examples("facts", ("Animal, plant or mineral? I am thinking of {}.",), kingdoms),
        *make_examples("facts", ("Which part of the {} plant ends up in the kitchen?",), kitchen),
        *make_examples("facts", ("{}: strings, wind or percussion? Say why.",), instruments),
    ]


def words_rows() -> list[Example]:
    """The rows of the source `words`."""
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
        *make_examples(
            "words",
            ("Give one synonym of '{}' and use it in a sentence.", "Another word for '{}', with an example?"),
            synonyms,
        ),
        *make_examples("words", ("What is the opposite of '{}'?", "Name an antonym: {}"), opposites),
        *make_examples("words", ("Which word is the odd one out: {}?",), odd),
        *make_examples("words", ("What do you call a group of {}?",), groups),
        *make_examples("words", ("Write a short sentence with the plural of '{}'.",), plurals),
        *make_examples("words", ("Three words that rhyme with '{}'?",), rhymes),
    ]


def arithmetic_rows() -> list[Example]:
    """The rows of the source `arithmetic`."""
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


def grammar_rows() -> list[Example]:
    """The rows of the source `grammar`."""
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
        *make_examples("grammar", ("Put into the past tense: {}", "{}\nSay that it happened yesterday."), past),
        *make_examples("grammar", ("Rewrite in the passive voice: {}", "{} (active to passive)"), passive),
        *make_examples("grammar", ("Make a yes-or-no question of this: {}",), questions),
        *make_examples("grammar", ("Correct the mistake: {}",), errors),
    ]
