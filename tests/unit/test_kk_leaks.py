"""No puzzle of one side is a puzzle of the other with other people, at any size: against networkx's isomorphisms.

A puzzle becomes a graph of people and claims, a claim being the truth table over the people on whom it depends; graphs
are compared by networkx's Weisfeiler-Lehman hash, which isomorphic graphs share, and by VF2 where hashes agree.
"""

import ast
import itertools
import random

import networkx as nx
import pytest

from kk.generate import iter_puzzles
from kk.split import class_of
from tests.unit.kk_reference import holds
from tests.unit.test_kk_generate import relabelled

TRAIN, TEST = 300, 60
SAME = {"node_match": lambda a, b: a["is"] == b["is"], "edge_match": lambda a, b: a["is"] == b["is"]}


def table(statement, people, n):
    """The truth of a statement under each assignment of these people's roles."""
    rows = []
    for roles in itertools.product((False, True), repeat=len(people)):
        everybody = [False] * n
        for person, role in zip(people, roles, strict=True):
            everybody[person] = role
        rows.append(holds(statement, tuple(everybody)))
    return tuple(rows)


def named(statement):
    parts = [named(part) if isinstance(part, tuple) else {part} for part in statement[1:]]
    return set().union(*parts)


def essential(statement, n):
    """People on whom the statement depends."""
    people, matters = sorted(named(statement)), []
    for person in people:
        truths = table(statement, [person, *(p for p in people if p != person)], n)
        if truths[: len(truths) // 2] != truths[len(truths) // 2 :]:
            matters.append(person)
    return matters


def graph(statements):
    """People and claims: a speaker "says" a claim, and a claim is "about" people, in places unless places are alike."""
    made, n = nx.Graph(), len(statements)
    made.add_nodes_from((("person", i), {"is": "person"}) for i in range(n))
    for speaker, statement in enumerate(statements):
        orders = [(table(statement, order, n), order) for order in itertools.permutations(essential(statement, n))]
        least = min(truths for truths, _ in orders)
        best = [order for truths, order in orders if truths == least]
        claim = ("claim", speaker)
        made.add_node(claim, **{"is": str(least)})
        said = {("person", speaker): ["says"]}
        for place, person in enumerate(best[0]):
            said.setdefault(("person", person), []).append("about" if len(best) > 1 else f"about {place}")
        made.add_edges_from((claim, person, {"is": ", ".join(words)}) for person, words in said.items())
    return made


def signature(made):
    return nx.weisfeiler_lehman_graph_hash(made, node_attr="is", edge_attr="is", iterations=3)


def puzzles(n, split, count):
    rows = itertools.islice(iter_puzzles(n, seed=5, split=split, cot=False), count)
    return [ast.literal_eval(row["statements"]) for row in rows]


@pytest.mark.parametrize("n", range(2, 15))
def test_no_test_puzzle_is_isomorphic_to_a_training_puzzle(n):
    train = {}
    for statements in puzzles(n, "train", TRAIN):
        train.setdefault(signature(made := graph(statements)), []).append((made, statements))

    def twins(statements):
        made = graph(statements)
        return [known for other, known in train.get(signature(made), []) if nx.is_isomorphic(made, other, **SAME)]

    test = puzzles(n, "test", TEST)
    assert len(test) == TEST and not any(map(twins, test))
    rng = random.Random(n)
    for statements in puzzles(n, "train", 20):  # what leaks is found, under any names; and the split knows it
        found = twins(relabelled(statements, rng.sample(range(n), n)))
        assert statements in found
        assert {class_of(known) for known in found} == {class_of(statements)}
