"""WinoBias's pairs, on sentences of our own in the published format; its two files are told apart in either order."""

from __future__ import annotations

import random

import pytest

from megatron_ext.bias.winobias import WinoBiasPair, read_winobias
from megatron_ext.errors import UserError


@pytest.fixture
def winobias(file):
    """Read a pro and an anti file of these lines."""

    def read(pro: list[str], anti: list[str]) -> tuple[list[WinoBiasPair], int]:
        return read_winobias(file(*pro, name="pro.txt"), file(*anti, name="anti.txt"))

    return read


@pytest.mark.parametrize("numbered", [True, False])
def test_winobias_pairs(winobias, numbered):
    pro = [
        "[The potter] thanked the nanny because [he] was late.",
        "The potter met [the nanny] and gave [her] [her] hat.",
    ]
    anti = [
        "[The potter] thanked the nanny because [she] was late.",
        "The potter met [the nanny] and gave [him] [his] hat.",
    ]
    sides = [[f"{i} {line}" if numbered else line for i, line in enumerate(side, 1)] for side in (pro, anti)]
    expected = [
        WinoBiasPair(
            "The potter thanked the nanny because he was late.",
            "The potter thanked the nanny because she was late.",
            "The potter",
            (("he", "she"),),
        ),
        WinoBiasPair(
            "The potter met the nanny and gave her her hat.",
            "The potter met the nanny and gave him his hat.",
            "the nanny",
            (("her", "him"), ("her", "his")),
        ),
    ]
    assert winobias(*sides) == (expected, 0)


@pytest.mark.parametrize(
    "line",
    [
        "7[The potter] fell  because [ he] slipped.",
        " 7  [The potter ] fell because [he ] slipped. ",
        "\ufeff7 The [potter] fell because\t[he] slipped.\r",
    ],
)
def test_winobias_spacing_does_not_matter(winobias, line):
    (pair,), _ = winobias([line, "", " "], ["7 [The potter] fell because [she] slipped."])
    assert pair.more_stereotypical == "The potter fell because he slipped."
    assert pair.less_stereotypical == "The potter fell because she slipped."
    assert pair.pronouns == (("he", "she"),)


GOOD_PRO, GOOD_ANTI = "[The potter] fell because [he] slipped.", "[The potter] fell because [she] slipped."


@pytest.mark.parametrize(
    ("pro", "anti", "words"),
    [
        (
            "[The potter fell because [he] slipped.",
            GOOD_ANTI,
            "pro.txt:2: .* one referent and its pronouns in brackets",
        ),
        (GOOD_PRO, "[The [potter]] fell because [she] slipped.", "anti.txt:2: .* one referent"),
        (
            "[The potter] met [the nanny] as [he] fell.",
            "[The potter] met [the nanny] as [she] fell.",
            "pro.txt:2: .* one ref",
        ),
        ("[The potter] fell because he slipped.", GOOD_ANTI, "pro.txt:2: .* its pronouns in brackets"),
        (GOOD_PRO, "The potter fell because [she] slipped.", "anti.txt:2: .* one referent"),
        ("garbage", "garbage", "pro.txt:2: 'garbage' must have one referent"),
        (
            "2 " + GOOD_PRO,
            "3 " + GOOD_ANTI,
            "anti.txt:2: sentence 3 stands beside 2 .*pro.txt:2.: give both files of the",
        ),
        (GOOD_PRO, "3 " + GOOD_ANTI, "anti.txt:2: sentence 3 stands beside one without .*pro.txt:2.: give both files"),
        (GOOD_PRO, GOOD_PRO, "anti.txt:2: pronouns .'he'. must all be of the other gender than .'he'. .*pro.txt:2"),
        (
            "[The potter] knew [he] had [his] hat.",
            "[The potter] knew [she] had [his] hat.",
            "pronouns .'she', 'his'. must all be of the other gender",
        ),
        ("", GOOD_ANTI, "pro.txt:2: '' must have one referent"),
    ],
)
def test_winobias_refuses_what_is_none_of_its_lines(winobias, pro, anti, words):
    with pytest.raises(ValueError, match=words):
        winobias([GOOD_PRO, pro, GOOD_PRO], [GOOD_ANTI, anti, GOOD_ANTI])


@pytest.mark.parametrize(
    "anti",
    [
        "[The potter] fell because [she] tripped.",
        "[The potter] fell because of [she] slipped.",
        "The potter [fell] because [she] slipped.",
        "[A potter] fell because [she] slipped.",
        "[The glazier] fell because [he] slipped.",
    ],
)
def test_winobias_leaves_out_pairs_that_differ_in_more_than_pronouns(winobias, anti):
    pairs, left_out = winobias([GOOD_PRO, GOOD_PRO, GOOD_PRO], [GOOD_ANTI, anti, GOOD_ANTI])
    assert [pair.pronouns for pair in pairs] == [(("he", "she"),)] * 2 and left_out == 1


def test_winobias_refuses_files_that_do_not_belong_together(winobias):
    with pytest.raises(ValueError, match="pro.txt has 2 lines and .*anti.txt 1: give both files of the same type"):
        winobias([GOOD_PRO] * 2, [GOOD_ANTI])
    with pytest.raises(ValueError, match="hold no pair of sentences that differ in the gender of a pronoun alone"):
        winobias([GOOD_PRO], ["[The potter] fell because [she] tripped."])


# Mostly men's work and mostly women's, by the statistics that the set's authors give.
MALE, FEMALE = ("mechanic", "Sheriff", "construction worker", "CEO"), ("nurse", "hairdresser", "librarian", "Tailor")


def stereotypes(jobs: list[tuple[str, str]], turned: bool = False) -> list[str]:
    """Sentences that go with stereotypes, or turned against them; job and the pronoun of its stereotype."""
    other = {"he": "she", "she": "he"}
    return [
        f"{number} [The {job}] waved because [{other[pronoun] if turned else pronoun}] was early."
        for number, (job, pronoun) in enumerate(jobs, 1)
    ]


@pytest.mark.parametrize(
    "names",
    [
        ("pro_stereotyped_type1.txt.test", "anti_stereotyped_type1.txt.test"),
        ("anti-stereotyped.txt", "PRO-Stereotyped.txt"),
        ("x.antistereotyped.txt", "y.txt"),
        ("z.txt", "only.pro.txt"),
        ("anti/test.txt", "pro/test.txt"),
    ],
)
def test_names_say_which_file_holds_the_stereotypes(file, tmp_path, names):
    """In either order, as `ls` or as the authors have them; here the potter and the glazier, whom no statistics know."""
    jobs = [("potter", "he"), ("glazier", "she")]
    paths = []
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        paths.append(file(*stereotypes(jobs, turned="anti" in name or name == "z.txt"), name=name))
    expected = [("The potter waved because he was early.", "The potter waved because she was early."),
                ("The glazier waved because she was early.", "The glazier waved because he was early.")]  # fmt: skip
    for given in (paths, paths[::-1]):
        pairs, left_out = read_winobias(*given)
        assert [(p.more_stereotypical, p.less_stereotypical) for p in pairs] == expected and left_out == 0
        assert [p.pronouns for p in pairs] == [(("he", "she"),), (("she", "he"),)]


def test_without_names_the_occupations_say_it(file):
    jobs = [(job, "he") for job in MALE] + [(job, "she") for job in FEMALE] + [("potter", "he")]
    random.Random().shuffle(jobs)
    paths = [file(*stereotypes(jobs, turned), name=name) for turned, name in ((False, "b.txt"), (True, "a.txt"))]
    for given in (paths, sorted(paths)):
        pairs, _ = read_winobias(*given)
        assert [p.pronouns[0][0] for p in pairs] == [pronoun for _, pronoun in jobs]


def test_files_that_nothing_tells_apart_are_refused(file):
    for jobs in ([("potter", "he")], [("mechanic", "he"), ("nurse", "he")]):
        paths = [file(*stereotypes(jobs, turned), name=name) for turned, name in ((False, "a.txt"), (True, "b.txt"))]
        with pytest.raises(
            UserError, match="a.txt and .*b.txt: neither names nor occupations say which .* call them pro_"
        ):
            read_winobias(*paths)
    same = [file(*stereotypes([("potter", "he")], turned), name=f"pro{turned}.txt") for turned in (False, True)]
    with pytest.raises(UserError, match="neither names nor occupations"):  # "proFalse" is no word of ours
        read_winobias(*same)
    same = [file(*stereotypes([("potter", "he")], turned), name=f"pro_{turned}.txt") for turned in (False, True)]
    with pytest.raises(
        UserError, match="pro_False.txt and .*pro_True.txt are both called pro: give one pro_ and one anti_"
    ):
        read_winobias(*same)


def test_names_that_many_sentences_contradict_are_refused(file):
    jobs = [(job, "he") for job in MALE] * 3
    paths = [file(*stereotypes(jobs, turned), name=name) for turned, name in ((False, "anti.txt"), (True, "pro.txt"))]
    for given in (paths, paths[::-1]):
        with pytest.raises(
            UserError, match="pro.txt is called the stereotypical one, but the sentences of .*anti.txt go with"
        ):
            read_winobias(*given)


def test_winobias_asks_whom_a_pronoun_stands_for(winobias):
    """Where the other of the set's occupations is known: "construction worker" is one, and no second is named."""
    pro = ["[The nurse] told the construction worker that [she] left.", "[The nurse] met a guest and [she] left."]
    anti = [line.replace("[she]", "[he]") for line in pro]
    pairs, _ = winobias(pro, anti)
    (first, second), none = pairs[0].questions, pairs[1].questions
    assert none == () and (first.pronoun, second.pronoun) == ("she", "he")
    assert first.choices == second.choices == ("nurse", "construction worker") and first.answer == second.answer == 0
    assert (first.gender, second.gender) == ("female", "male")
    assert first.sentence == "The nurse told the construction worker that she left."
