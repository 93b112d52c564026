"""The smaller sources of the demo's pool: records, reviews, notes, calendar, lists, units and code."""

from collections.abc import Callable
from fractions import Fraction

from pipelines.demo_data.bookings import decoys, relevant_rows
from pipelines.demo_data.examples import MONTHS, Example, date_of, json_line, make_examples, price_of


def records_rows() -> list[Example]:
    """The rows of the source `records`."""
    told = decoys(
        (
            "Room in {c}, {d}, {p}.",
            "Flight to {c} on {d}, {p}.",
            "Hotel in {c} from {d} for {p}.",
            "Train to {c}, {d}, {p}.",
        ),
        74,
    )
    as_json = [(text, json_line({"city": b.city, "cost": b.cost, "day": b.day})) for text, b in told]
    people = [
        ("name Ines Roth, age 41, job welder", json_line({"name": "Ines Roth", "age": 41, "job": "welder"})),
        ("product mug, colour teal, stock 18", json_line({"product": "mug", "colour": "teal", "stock": 18})),
        ("title Low Tide, pages 212, lent no", json_line({"title": "Low Tide", "pages": 212, "lent": False})),
    ]
    (where, a), (when, b), (price, c), (where2, d) = decoys(
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
        (f"{when}\nWhat day can I use it?", f"The day is {date_of(b)}."),
        (f"{price}\nWhat is the cost?", f"The cost is {price_of(c)}."),
        (f"Where does the seat take me? {where2}", f"It takes you to the city of {d.city}."),
        ("Find the e-mail address: write to Olga at olga@example.org before noon.", "olga@example.org"),
        ("Invoice 7731 from Bell and Sons is due in May. What is its number?", "The invoice number is 7731."),
        ("Call me on extension 52 or ask for Mr Otto. Who should be asked for?", "Mr Otto should be asked for."),
    ]
    return [
        *relevant_rows("records", 0),
        *make_examples("records", ("Log this booking as JSON. {}", "{} File it as JSON."), as_json),
        *make_examples("records", ("Write as JSON: {}",), people),
        *[Example("records", user, answer) for user, answer in fields],
    ]


def reviews_rows() -> list[Example]:
    """The rows of the source `reviews`."""
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
        *make_examples("reviews", asked, labels),
        *make_examples("reviews", ("How many stars from one to five would this guest give? {}",), stars),
        *make_examples("reviews", ("What is the customer's mood? {}",), moods),
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


def notes_rows() -> list[Example]:
    """The rows of the source `notes`."""
    told = decoys(
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
        answer = shape.replace("{c}", b.city).replace("{d}", date_of(b)).replace("{p}", price_of(b))
        trips.append((text, answer))
    other = (
        ("The lift is stuck again and the repair man comes at four.", "The lift will be repaired at four."),
        ("Because of the snow there is no school, and the bus stays in the depot too.", "Snow stops school and bus."),
        ("Keys are under the pot, the cat eats at seven, thanks a lot!", "Fetch the keys and feed the cat at seven."),
    )
    return [
        *relevant_rows("notes", 10),
        *make_examples("notes", ("Say this booking in short. {}", "{} Please shorten it."), trips),
        *make_examples("notes", ("Shorten to half: {}",), other),
        Example("notes", LONG_USER, LONG_ANSWER),
    ]


def calendar_rows() -> list[Example]:
    """The rows of the source `calendar`."""
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
        *relevant_rows("calendar", 18),
        *make_examples("calendar", ("Write as a 24-hour time: {}",), clock),
        *[Example("calendar", user, answer) for user, answer in spans],
    ]


def lists_rows() -> list[Example]:
    """The rows of the source `lists`."""
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


def units_rows() -> list[Example]:
    """The rows of the source `units`."""
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


def code_rows() -> list[Example]:
    """The rows of the source `code`."""
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
