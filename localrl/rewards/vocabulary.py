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

NO_NOUNS = CHANGES | _set("""
    because since as which where when who that this is are was were will would can could should may
    might must has have had be been if then else
""")
"""Words that what is counted does not consist of."""

REFUSED_BEFORE = _set("""
    not or than minus negative plus times by log ln sin cos tan exp sqrt mod twice double triple
    half except between neither nor never cannot least most thrice over under above below almost
    nearly hardly exceeds exceed like unlike but lg lb arcsin arccos arctan sinh cosh tanh page step
    chapter problem equation figure section exercise question base digit case january february march
    april june july august september october november december
""")
"""Words directly before a number that make another one of it, or none."""

REFUSED_IN_SUBJECT = _set("""
    not no never neither nor none nobody nothing cannot than least most between either if unless
    except or and half double triple twice root square cube power log minus negative plus times
    product difference quotient remainder factorial mod digit digits base exponent
""")
"""Words that the subject of a sentence "... is 5" may not hold."""

AMOUNTS = _set("""
    total cost price amount number value answer result distance length area volume speed rate age
    average mean maximum minimum weight height width perimeter profit sum consists
""")
"""Words after which "of 5" is 5, unlike "half of 5"."""
