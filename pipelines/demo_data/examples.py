"""The rows of the demo as values: a conversation, a booking, and how they are written."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

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
    """One user and one assistant turn; `relevant` pool rows teach the target's skill."""

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
        """Return a sentence with its {c}, {d} and {p} filled in.

        Args:
            sentence: The sentence.
            style: A number that determines how date and price are written.
        """
        ending = "th" if 10 < self.day < 14 else {1: "st", 2: "nd", 3: "rd"}.get(self.day % 10, "th")
        month = MONTHS[self.month - 1]
        date = (f"{self.day} {month}", f"{month} {self.day}", f"{self.day}{ending} {month}")[style % 3]
        price = MONEY[self.currency][style % 2].format(self.cost)
        told = sentence.replace("{c}", self.city).replace("{d}", date).replace("{p}", price)
        return told[0].upper() + told[1:]

    @property
    def line(self) -> str:
        """The booking in the format that the target requires."""
        return f"city: {self.city} | day: {self.day} {MONTHS[self.month - 1][:3]} | cost: {self.cost} {self.currency}"


def make_bookings(cities: Sequence[tuple[str, str]], n: int, start: int) -> list[Booking]:
    """Return bookings that cycle through the cities; day and month repeat after 84 of them, the cost after 73.

    Args:
        cities: (city, currency) pairs.
        n: The number of bookings.
        start: The number of the first booking.
    """
    result = []
    for i in range(start, start + n):
        city, currency = cities[i % len(cities)]
        cost = (21 + i * 31 % 73) * (100 if currency == "JPY" else 1)
        result.append(Booking(city, 1 + i * 11 % 28, 1 + i * 5 % 12, cost, currency))
    return result


def ask(wordings: Sequence[str], items: Iterable[str]) -> list[str]:
    """Return every item inside one of the wordings, in turn.

    Args:
        wordings: Texts with {} for the item.
        items: The items.
    """
    return [wordings[i % len(wordings)].replace("{}", item) for i, item in enumerate(items)]


def make_examples(source: str, wordings: Sequence[str], pairs: Sequence[tuple[str, str]]) -> list[Example]:
    """Return one row per (item, answer), with the wordings in turn.

    Args:
        source: The source of the rows.
        wordings: Texts with {} for the item.
        pairs: (item, answer) pairs.
    """
    asked = ask(wordings, (item for item, _ in pairs))
    return [Example(source, user, answer) for user, (_, answer) in zip(asked, pairs, strict=True)]


def json_line(value: object) -> str:
    """Return a value as JSON on one line, as in the rows.

    Args:
        value: The value.
    """
    return json.dumps(value, ensure_ascii=False)


def date_of(booking: Booking) -> str:
    """Return the day of a booking, such as 1 January.

    Args:
        booking: The booking.
    """
    return f"{booking.day} {MONTHS[booking.month - 1]}"


def price_of(booking: Booking) -> str:
    """Return the cost of a booking with its currency.

    Args:
        booking: The booking.
    """
    return MONEY[booking.currency][0].format(booking.cost)
