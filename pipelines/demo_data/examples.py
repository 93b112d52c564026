"""The rows of the demo as values: an example of a conversation, a booking, and how they are written."""

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


def make_bookings(cities: Sequence[tuple[str, str]], n: int, start: int) -> list[Booking]:
    """N bookings that run through the cities; day and month repeat after 84 of them, the cost after 73."""
    result = []
    for i in range(start, start + n):
        city, currency = cities[i % len(cities)]
        cost = (21 + i * 31 % 73) * (100 if currency == "JPY" else 1)
        result.append(Booking(city, 1 + i * 11 % 28, 1 + i * 5 % 12, cost, currency))
    return result


def ask(wordings: Sequence[str], items: Iterable[str]) -> list[str]:
    """Every item inside one of the wordings, in turn."""
    return [wordings[i % len(wordings)].replace("{}", item) for i, item in enumerate(items)]


def make_examples(source: str, wordings: Sequence[str], pairs: Sequence[tuple[str, str]]) -> list[Example]:
    """One example per (item, answer), with the wordings in turn."""
    asked = ask(wordings, (item for item, _ in pairs))
    return [Example(source, user, answer) for user, (_, answer) in zip(asked, pairs, strict=True)]


def json_line(value: object) -> str:
    """JSON as the rows hold it, on one line."""
    return json.dumps(value, ensure_ascii=False)


def date_of(booking: Booking) -> str:
    """The day of a booking, such as 1 Jan."""
    return f"{booking.day} {MONTHS[booking.month - 1]}"


def price_of(booking: Booking) -> str:
    """The cost of a booking, with its currency."""
    return MONEY[booking.currency][0].format(booking.cost)
