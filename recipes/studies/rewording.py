"""Questions changed by rule, as others might ask them: fewer words, another order, other words, other openings."""

import random
import re
from collections.abc import Callable, Mapping


# Common words of questions, and what may stand for them; no word of a name among them.
_SYNONYMS = """
author:writer authored:written authors:writers award:prize awards:prizes background:roots birthplace:hometown
book:volume books:volumes born:raised can:could career:vocation city:town colour:hue community:group complete:whole
details:particulars describe:portray early:initial evolved:changed experiences:encounters explore:examine
famous:celebrated father:dad fiction:storytelling food:dish full:complete garden:yard genre:category
genres:categories impact:effect influence:shape influenced:shaped inspired:motivated instrument:music job:work
kind:sort known:famous life:existence like:prefer likes:prefers literary:bookish literature:letters live:reside
lives:resides mention:say morning:dawn most:mostly mother:mum name:state notable:noteworthy novel:story
novels:stories often:frequently order:request parents:folks personal:private play:perform popular:beloved
practise:do primarily:mainly primary:main profession:job professions:jobs provide:give published:released
readers:audience receive:get received:won recurring:repeated reflect:mirror renowned:celebrated ring:jewel
series:saga share:tell significant:important some:any specific:particular sport:game stone:gem style:manner
tell:inform theme:topic themes:topics title:heading titles:headings type:kind unique:special upbringing:childhood
won:earned work:occupation works:writings write:compose writer:author writing:prose written:penned
""".split()  # fmt: skip
SYNONYMS = dict(pair.split(":") for pair in _SYNONYMS)

# How a question opens -> the same request in another form; the first that fits is taken.
_OPENINGS = (
    (r"what (?:is|was) (.*)\?", "I would like to know {0}."),
    (r"what are (.*)\?", "Please list {0}."),
    (r"(?:who|whom) (?:is|are|was|were) (.*)\?", "Give the identity of {0}."),
    (r"(?:can|could) you (.*)\?", "Please {0}."),
    (r"how (?:does|did|do|has|have|is|was) (.*)\?", "Explain the way {0}."),
    (r"(?:has|have|did|does|do|is|are|was|were) (.*)\?", "True or not: {0}?"),
    (r"in (?:which|what) (.*)\?", "Say the {0}."),
    (r"(?:what|which) (.*)\?", "Say which {0}."),
    (r"where (?:is|was|does|did) (.*)\?", "At which place {0}?"),
    (r"(.*)\?", "Answer this: {0}?"),
)
_DROPPED = 0.3


def fewer_words(question: str, rng: random.Random) -> str:
    """The question with three of ten words dropped, whichever; one is left at least."""
    words = question.split()
    return " ".join([word for word in words if rng.random() >= _DROPPED] or [rng.choice(words)])


def another_order(question: str, rng: random.Random) -> str:
    """The question's words in random order."""
    words = question.split()
    rng.shuffle(words)
    return " ".join(words)


def other_words(question: str, _: random.Random | None = None) -> str:
    """The question with synonyms for the words that have one."""
    return re.sub(r"\w+", lambda match: _synonym(match.group()), question)


def other_opening(question: str, _: random.Random | None = None) -> str:
    """The question asked in another form, with synonyms."""
    for opening, form in _OPENINGS:
        if match := re.fullmatch(opening, question.strip(), re.IGNORECASE):
            return other_words(form.format(match.group(1)))
    return other_words(question)


def _synonym(word: str) -> str:
    found = SYNONYMS.get(word.casefold())
    if found is None:
        return word
    return found.capitalize() if word[0].isupper() else found


REWORDINGS: Mapping[str, Callable[[str, random.Random], str]] = {
    "fewer words": fewer_words,
    "another order": another_order,
    "other words": other_words,
    "other opening": other_opening,
}


def reworded(question: str, rule: str) -> str:
    """
    A question changed by a rule; the same one is always changed alike.

    Args:
        question (`str`): The question.
        rule (`str`): A key of `REWORDINGS`.

    Example:

    ```python
    >>> from studies.rewording import reworded

    >>> reworded("Which novel has Ada Byron written?", "other words")
    'Which story has Ada Byron penned?'
    ```
    """
    return REWORDINGS[rule](question, random.Random(f"{rule}-{question}"))
