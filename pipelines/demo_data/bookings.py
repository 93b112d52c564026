"""The bookings of the demo: what the target asks for, and the rows of the pool that teach it or mislead."""

from collections.abc import Sequence

from pipelines.demo_data.examples import Booking, Example, ask, make_bookings

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


def relevant_rows(source: str, start: int) -> list[Example]:
    """Return the rows of one source that answer in the format of the target.

    Args:
        source: The source.
        start: The number of the first booking.
    """
    wordings, sentences = RELEVANT[source]
    bookings = make_bookings(POOL_CITIES, len(sentences), start)
    told = [booking.tell(sentence, i) for i, (booking, sentence) in enumerate(zip(bookings, sentences, strict=True))]
    asked = ask(wordings, told)
    return [Example(source, u, b.line, relevant=True) for u, b in zip(asked, bookings, strict=True)]


def target_rows() -> list[Example]:
    """Return the rows of the target and of the test: each sentence once, with six wordings in turn."""
    result: list[Example] = []
    for subtask, sentences in TARGET_SENTENCES.items():
        start = 26 + len(result)  # after the pool's relevant rows, so that no date and price of theirs comes back
        bookings = make_bookings(TARGET_CITIES, len(sentences), start)
        for i, (booking, sentence) in enumerate(zip(bookings, sentences, strict=True)):
            # i + i // 6 moves the date's style against the wording, which also repeats every six rows
            user = TARGET_WORDINGS[(i + start) % 6].replace("{}", booking.tell(sentence, i + i // 6))
            result.append(Example("bookings", user, booking.line, subtask=subtask))
    return result


def decoys(sentences: Sequence[str], start: int) -> list[tuple[str, Booking]]:
    """Return descriptions of bookings in the target's own cities, for rows with answers in another format.

    Args:
        sentences: The sentences.
        start: The number of the first booking.
    """
    bookings = make_bookings(TARGET_CITIES, len(sentences), start)
    return [(b.tell(s, i + 1), b) for i, (b, s) in enumerate(zip(bookings, sentences, strict=True))]
