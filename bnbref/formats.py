"""The registry of 4-bit codebooks: by the names that layers, files and configurations use. Its one instance is
`bnbref.codebooks.FOUR_BIT`."""

from collections.abc import Iterator, MutableMapping

from bnbref.codebook import Codebook

NOT_A_FORMAT = ("int8", "plain")
"""Names of formats that are not of four bits. A codebook cannot have one of them."""


class Formats(MutableMapping[str, Codebook]):
    """4-bit codebooks by name. Setting another codebook under a name that has one, or had one before it was deleted, raises
    ValueError: what was quantized under that name would decode to other values."""

    # Not a dict, whose `update` and `setdefault` write past these checks.
    def __init__(self, *books: Codebook) -> None:
        self._books: dict[str, Codebook] = {}
        self._ever: dict[str, Codebook] = {}
        self.update({book.name: book for book in books})
        self._own = frozenset(self._books)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self._books)})"

    def __setitem__(self, name: str, book: Codebook) -> None:
        if not isinstance(book, Codebook) or book.bits != 4:
            raise ValueError(f"a format is a Codebook of at most 16 values, got {book!r}")
        if book.name != name or not name.replace("_", "x").isalnum() or name in NOT_A_FORMAT:
            raise ValueError(
                f"a format has the name of its codebook, of letters, digits and underscores, and not 'int8' or 'plain', "
                f"got {name!r}"
            )
        if self._ever.setdefault(name, book) != book:
            raise ValueError(f"the name {name!r} has had another codebook already: give this one another name")
        self._books[name] = book

    def __getitem__(self, name: str) -> Codebook:
        return self._books[name]

    def __delitem__(self, name: str) -> None:
        if name in self._own:
            raise ValueError(f"{name!r} is a codebook of bnbref's own, which stays")
        del self._books[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._books)

    def __len__(self) -> int:
        return len(self._books)
