"""The English words that decide if a number beside them is the answer. Plain Python."""

from __future__ import annotations


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


CHANGES = _set("""
    hundred hundreds thousand thousands million millions billion billions trillion trillions
    quadrillion dozen dozens gross grand score pair
    pairs lakh lakhs crore crores mln bln bn mn tn mil mio half halves third thirds
    quarter quarters fourth fourths fifth fifths sixth sixths seventh sevenths eighth eighths ninth
    ninths tenth tenths twelfths hundredth hundredths thousandth thousandths millionth millionths
    and or to than plus minus times over divided multiplied mod modulo choose root roots power
    squared cubed factorial pi tau phi theta infinity sqrt log sin cos tan exp not no never nor
    neither wrong incorrect false out unless except if but versus until through twice double
    triple fold point
""")
"""Words after a number that make another one of it, or none."""

NOT_BEHIND = _set("""
    ago earlier later base binary octal hexadecimal hex ternary wrong wrongly incorrect
    incorrectly false mistaken
    mistake mistakenly not never cannot impossible unlikely invalid fails fail failed too if unless
    assuming provided suppose excluded rejected doubtful
    doesn't isn't can't don't won't
""")
"""Words later in the clause of the last number that deny it, or make another one of it."""

NO_NOUNS = (
    CHANGES
    | (NOT_BEHIND - {"mistake"})
    | _set("""
    because since as which where when who that this is are was were will would can could should may
    might must has have had be been if then else ago base bases binary octal hexadecimal hex
    ternary decimal thou away from with without by before after modulo
    using given st nd rd th less fewer exceeds equals
    ahead earlier later maybe perhaps possibly ish below above
""")
)
"""Words that what is counted does not consist of."""

NOT_AFTER = CHANGES | _set("""
    ago away as base bases binary octal hexadecimal hex ternary each apiece thou modulo st nd rd th
    too if when while assuming provided less fewer exceeds below above under over
    ahead maybe perhaps possibly ish without
""")
"""Words directly after the last number of a text that make another one of it, or none."""

DENIALS = _set("""
    not never neither nor none nobody nothing cannot cant no without excluding except unlike wrong
    wrongly incorrect incorrectly false mistake mistaken mistakenly error impossible unlikely doubt
    doubtful deny denies denied reject rejects rejected exclude excludes excluded avoid avoids
    disagree disagrees refute refuted instead unknown unclear unsure uncertain
""")
"""Words that deny what their clause says."""

SUPPOSITIONS = _set("""
    if when whenever suppose supposing supposed assume assumes assuming assumed let imagine unless
    whether maybe perhaps thought possibly probably presumably guess guessing guessed pretend
    hypothetically provided say approach approaches
    approaching tend tends modulo mod substitute substituting plug
    plugging setting putting letting
""")
"""Words whose clause only supposes what it says."""

PLACES = _set(
    "with for at where when if suppose let assuming assume given taking setting set put "
    "putting letting using as replacing substituting plugging try trying say while until"
)
"""Words before "x = 5" that suppose it, rather than tell it."""

REFUSED_BEFORE = _set("""
    not or than minus negative plus times by log ln sin cos tan exp sqrt mod modulo twice double
    triple half except between neither nor never cannot least most thrice over under above below
    almost nearly hardly exceeds exceed like unlike but lg lb arcsin arccos arctan sinh cosh
    tanh page step chapter problem equation figure section exercise question base digit case
    january february march april june july august september october november december and
    through thru without excluding from add adds added adding subtract subtracts subtracted
    subtracting divide divides multiply multiplies remove removes removed away another extra
    raise raises square squares cube cubes deduct deducts increase increases decrease decreases
    rounds rounding approaches
""")
"""Words directly before a number, or a name that equals it, that make another one of it."""

LABELS = _set("""
    line row column part option hint note version item level grade group room rule theorem lemma
    table appendix stage round phase task number no nr example volume choice footnote
""")
"""Words before a number that only labels something."""

TELLS = _set("""
    is are was were be been being equals equal equalling equaling has have had having get gets got
    getting give gives gave giving make makes made making yield yields yielding leave leaves left
    leaving cost costs total totals totalling totaling sum sums answer result results solution value
    need needs needed take takes took taking spend spends spent pay pays paid earn earns earned save
    saves saved sell sells sold buy buys bought eat eats ate read reads weigh weighs run runs ran
    drive drives drove travel travels use uses used hold holds held contain contains include
    includes count counts find finds found obtain obtains see sees saw win wins won score scores
    scored produce produces receive receives received owe owes collect collects last lasts live
    lives work works remain remains become becomes mean means show shows keep keeps kept lose loses
    lost grow grows grew sleep sleeps slept do does did write writes wrote bake bakes
    only just exactly precisely about approximately around roughly simply now still also
    altogether therefore thus so hence then finally overall actually already a an its his her their
    our my your him them us me it you all namely there
    exist exists existed worth i've we've it's that's there's he's she's
""")
"""Words directly before the last number of a text after which it is what the text says."""

TOLD_TO = _set(
    "equal equals comes come came amounts amount adds add sums sum simplifies reduces "
    "evaluates leads brings due equivalent identical corresponds"
)
"""Words before "to 5" after which it is 5, unlike "rounded to 5"."""

PLACED = _set("for at in after during within")
"""Words before the last number after which it counts if a unit or a noun follows."""

LEFT_WITH = _set("left up end ends ended finish finishes finished remain remains stay stays")
"""Words before "with 5" after which it is what there is."""

DOERS = _set("i we you he she it they who can will would should must to could and")
"""Words before a verb, after which a number counts: she picks 5, to bake 5."""

REFUSED_IN_SUBJECT = (
    _set("""
    not no never neither nor none nobody nothing cannot than least most between either if unless
    except or and half double triple twice root square cube power log minus negative plus times
    product difference quotient remainder factorial mod digit digits base exponent modulo absolute
    inverse reciprocal without excluding
""")
    | SUPPOSITIONS
    | DENIALS
)
"""Words that the subject of a sentence "... is 5" may not hold."""

AMOUNTS = _set("""
    total cost price amount number value answer result distance length area volume speed rate age
    average mean maximum minimum weight height width perimeter profit sum consists balance refund
    discount loss salary income fee bill tax score length size population revenue
""")
"""Words after which "a ... of 5" is 5, unlike "half of 5"."""

NUMBER_WORDS = {
    word: value
    for values, words in (
        (
            range(21),
            "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
            "fifteen sixteen seventeen eighteen nineteen twenty",
        ),
        (range(30, 101, 10), "thirty forty fifty sixty seventy eighty ninety hundred"),
    )
    for value, word in zip(values, words.split(), strict=True)
}
"""Small numbers in words."""
