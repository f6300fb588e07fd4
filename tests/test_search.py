"""Search: the best path by brute force, tree arithmetic in float64, tokens counted, ties and missing scores, the real engine."""

import itertools
import math
import random
from collections import Counter

import pytest
from tiny_models import llama, ready

from fastalign.data import Prompt
from fastalign.generation import Engine, SamplingParams
from fastalign.recipes import arithmetic
from fastalign.search import Path, Policy, Stem, TreeOptions, beam_search, best_of_n, majority_vote, mcts, voted, weighted_vote
from fastalign.search.tree import PRIORS, RULES, Node, back_up, close, discounted_ucb, puct, select, uct

DEPTH, LETTERS = 3, "abc"


def prompts_of(count):
    return [Prompt([1], f"p{i}", {}, i) for i in range(count)]


class Letters:
    """A policy over three letters a step and three steps a solution; steps are listed in turn, solutions are drawn by a seeded hand."""

    def __init__(self):
        self.asked = []

    @staticmethod
    def logprob(text):
        return math.log((1 + LETTERS.index(text[-1])) / 6)

    def grow(self, path, letter):
        text = path.text + letter
        sums = (*path.logprobs, self.logprob(text))
        ids, ends = (*path.ids, ord(letter)), (*path.ends, len(path.ids) + 1)
        return Path(ids, ends, (*path.steps, letter), sums, text, "stop" if len(text) == DEPTH else "")

    def step(self, stems, n):
        self.asked.append([(stem.prompt.index, stem.path.text, stem.serial) for stem in stems])
        return [[self.grow(stem.path, LETTERS[i % 3]) for i in range(n)] for stem in stems]

    def complete(self, stems, n):
        self.asked.append([(stem.prompt.index, stem.path.text, stem.serial) for stem in stems])
        return [[self.finish(stem, i) for i in range(n)] for stem in stems]

    def finish(self, stem, i):
        draw, path = random.Random(f"{stem.prompt.index} {stem.serial} {i}"), stem.path
        while not path.finished:
            path = self.grow(path, draw.choice(LETTERS))
        return path

    def first_step(self, path, behind):
        return self.grow(behind, path.steps[len(behind.steps)])


def worth(prompt, text):
    """A number in (0, 1) for any beginning of a solution, another one for each prompt."""
    return random.Random(f"{prompt.index}:{text}").random()


def scorer(prompts, paths):
    return [worth(prompt, path.text) for prompt, path in zip(prompts, paths, strict=True)]


def every_solution():
    return ["".join(letters) for letters in itertools.product(LETTERS, repeat=DEPTH)]


def best_by_brute_force(prompt):
    return max(every_solution(), key=lambda text: worth(prompt, text))


# --- beams --------------------------------------------------------------------------------------------------------


def test_beams_wide_enough_are_an_exhaustive_search():
    prompts = prompts_of(5)
    for prompt, found in zip(prompts, beam_search(Letters(), prompts, scorer, num_beams=27, num_expansions=3), strict=True):
        assert sorted(path.text for path in found.paths) == every_solution()
        assert found.path.text == best_by_brute_force(prompt)
        assert found.scores == scorer([prompt] * 27, found.paths)
        assert found.num_scored == 3 + 9 + 27
        assert found.num_tokens == 27 * 3 + 3 * 3 + 9 * 3  # the first round draws 27 * 3, of which three are distinct


def plain_beam(prompt, num_beams):
    """Beam search over all next letters, by hand."""
    beams = [""]
    for _ in range(DEPTH):
        beams = sorted((beam + letter for beam in beams for letter in LETTERS), key=lambda text: -worth(prompt, text))[:num_beams]
    return beams


@pytest.mark.parametrize("num_beams", [1, 2, 3])
def test_beams_keep_the_best_of_each_round(num_beams):
    prompts = prompts_of(6)
    for prompt, found in zip(prompts, beam_search(Letters(), prompts, scorer, num_beams=num_beams, num_expansions=3), strict=True):
        last = plain_beam(prompt, num_beams)
        assert set(last) <= {path.text for path in found.paths}
        assert found.score >= worth(prompt, last[0])
        assert found.path.text == max((path.text for path in found.paths), key=lambda text: worth(prompt, text))


def test_beams_of_all_prompts_go_on_in_one_call():
    policy = Letters()
    beam_search(policy, prompts_of(4), scorer, num_beams=2, num_expansions=3)
    assert len(policy.asked) == DEPTH
    assert Counter(index for index, _, _ in policy.asked[1]) == {0: 2, 1: 2, 2: 2, 3: 2}
    keys = [(index, serial) for call in policy.asked for index, _, serial in call]
    assert len(keys) == len(set(keys)), "every stem draws its own numbers"


def test_a_finished_beam_keeps_its_place_and_the_best_that_was_seen_wins():
    """'a' ends at once with 0.9; the others fall from 1.0 to 0.1."""

    class Early(Letters):
        def grow(self, path, letter):
            grown = super().grow(path, letter)
            return grown if grown.text != "a" else Path(grown.ids, grown.ends, grown.steps, grown.logprobs, "a", "stop")

    def falling(prompts, paths):
        return [0.9 if path.text == "a" else {1: 1.0, 2: 0.95, 3: 0.1}[len(path.text)] for path in paths]

    (narrow,) = beam_search(Early(), prompts_of(1), falling, num_beams=1, num_expansions=3)
    assert (narrow.path.text, narrow.score) == ("a", 0.9)
    assert "a" in [path.text for path in narrow.paths]
    assert len(narrow.paths) > 1, "the beam itself went on to the end"


# --- trees --------------------------------------------------------------------------------------------------------


def test_puct_and_uct_are_their_equations():
    node, child = Node(Path(), visits=7.0), Node(Path(), prior=0.3, visits=2.0, total=1.5)
    c = 1.25 + math.log((1 + 7 + 19652) / 19652)
    assert puct(node, child) == pytest.approx(0.75 + c * 0.3 * math.sqrt(7) / 3, rel=1e-15)
    assert uct(node, child) == pytest.approx(0.75 + math.sqrt(2) * math.sqrt(math.log(7) / 2), rel=1e-15)
    unvisited = Node(Path(), prior=0.3, value=0.4)
    assert puct(node, unvisited) == pytest.approx(0.4 + c * 0.3 * math.sqrt(7), rel=1e-15)
    assert uct(node, unvisited) == math.inf


def test_discounted_ucb_weighs_late_visits_more():
    """W and N of arXiv:2408.08152: sums of γ^(n - t)."""
    node = Node(Path())
    child, again = Node(Path(), node), Node(Path(), node)
    node.children, node.again = [child], again
    for reward in (1.0, 0.0, 1.0):
        back_up(child, reward, 0.99)
    back_up(again, 0.0, 0.99)
    visits, total = 1 + 0.99 + 0.99**2, 1 + 0.99**2
    assert child.visits == pytest.approx(visits, rel=1e-15)
    assert discounted_ucb(node, child) == pytest.approx(total / visits + math.sqrt(2 * math.log(visits + 1) / visits), rel=1e-14)


def test_backing_up_counts_every_node_on_the_way_once():
    root = Node(Path())
    middle = Node(Path(), root)
    leaf, other = Node(Path(), middle), Node(Path(), middle)
    root.children, middle.children = [middle], [leaf, other]
    for node, value in ((leaf, 0.25), (leaf, 0.5), (other, 1.0)):
        back_up(node, value)
    assert [(n.visits, n.total) for n in (leaf, other, middle, root)] == [(2, 0.75), (1, 1.0), (3, 1.75), (3, 1.75)]
    close(leaf)
    assert not middle.closed
    assert select(root, RULES["puct"]) is other
    close(other)
    assert root.closed


def test_priors_are_the_shares_they_say():
    def child(logprob, num_tokens, drawn):
        return Node(Path(tuple(range(num_tokens)), (num_tokens,), ("s",), (logprob,)), drawn=drawn)

    children = [child(-1.0, 1, 3), child(-4.0, 4, 1), child(-1.0, 2, 4)]
    step = [math.exp(-1), math.exp(-4), math.exp(-1)]
    assert PRIORS["step_probability"](children) == pytest.approx([s / sum(step) for s in step], rel=1e-14)
    token = [math.exp(-1), math.exp(-1), math.exp(-0.5)]
    assert PRIORS["token_probability"](children) == pytest.approx([t / sum(token) for t in token], rel=1e-14)
    assert PRIORS["draw_share"](children) == [3 / 8, 1 / 8, 4 / 8]


@pytest.mark.parametrize("rule", ["puct", "uct"])
def test_a_tree_that_may_grow_far_enough_is_an_exhaustive_search(rule):
    """13 inner nodes: root, 3 and 9."""
    prompts, policy = prompts_of(5), Letters()
    found = mcts(policy, prompts, scorer, value=scorer, options=TreeOptions(num_simulations=50, num_expansions=3, rule=rule))
    for prompt, result in zip(prompts, found, strict=True):
        assert sorted(path.text for path in result.paths) == every_solution()
        assert result.path.text == best_by_brute_force(prompt)
        assert result.num_tokens == 13 * 3
        assert result.num_scored == 13 * 3
    assert len(policy.asked) == 13, "a tree with nothing left ends the search"


def plain_puct(prompt, num_simulations):
    """The order in which nodes are gone on from, by dictionaries and sums alone."""
    visits, total, closed, opened = Counter(), Counter(), set(), []
    expanded = set()

    def score(parent, child):
        mean = total[child] / visits[child] if visits[child] else worth(prompt, child)
        prior = (1 + LETTERS.index(child[-1])) / 6
        c = 1.25 + math.log((1 + visits[parent] + 19652) / 19652)
        return mean + c * prior * math.sqrt(visits[parent]) / (1 + visits[child])

    def up(text, value):
        for end in range(len(text) + 1):
            visits[text[:end]] += 1
            total[text[:end]] += value

    while len(opened) < num_simulations and "" not in closed:
        node = ""
        while node in expanded:
            at = node
            node = max((at + letter for letter in LETTERS if at + letter not in closed), key=lambda child: score(at, child))
        up(node, worth(prompt, node) if node else 0.0)
        if len(node) == DEPTH:
            closed.add(node)
            while node and all(node[:-1] + letter in closed for letter in LETTERS):
                node = node[:-1]
                closed.add(node)
            continue
        expanded.add(node)
        opened.append(node)
    return opened


@pytest.mark.parametrize("num_simulations", [1, 4, 9, 13])
def test_trees_grow_in_the_order_that_puct_says(num_simulations):
    prompts, policy = prompts_of(8), Letters()
    options = TreeOptions(num_simulations=num_simulations, num_expansions=3, prior="step_probability")
    mcts(policy, prompts, scorer, value=scorer, options=options)
    for prompt in prompts:
        grown = [text for call in policy.asked[:num_simulations] for index, text, _ in call if index == prompt.index]
        assert grown == plain_puct(prompt, num_simulations)


def test_a_tree_without_a_solution_is_completed():
    policy = Letters()
    found = mcts(policy, prompts_of(3), scorer, value=scorer, options=TreeOptions(num_simulations=1, num_expansions=3))
    assert [len(result.paths) for result in found] == [1, 1, 1]
    assert [result.num_tokens for result in found] == [3 + 2] * 3
    assert len(policy.asked) == 2, "all of them in one call"


def test_rollouts_count_for_the_steps_they_went_through():
    prompts, policy = prompts_of(4), Letters()
    options = TreeOptions(num_simulations=3, num_expansions=8)
    for prompt, result in zip(prompts, mcts(policy, prompts, scorer, options=options), strict=True):
        drawn = []
        for call in policy.asked:
            for index, text, serial in call:
                path = Path(steps=tuple(text), text=text)
                drawn += [policy.finish(Stem(prompt, path, serial), i).text for i in range(8)] if index == prompt.index else []
        assert len(drawn) == 24
        assert {path.text for path in result.paths} == set(drawn)
        assert result.path.text == max(drawn, key=lambda text: worth(prompt, text))
        assert result.num_scored >= len(set(drawn))
        for chain in result.chains:
            text = ""
            for step in chain:
                text += step.text
                through = [solution for solution in drawn if solution.startswith(text)]
                assert step.visits <= len(through), "rollouts from above that happened to pass a later step are not its own"
            first = chain[0]
            through = [worth(prompt, solution) for solution in drawn if solution.startswith(first.text)]
            assert (first.visits, first.mean) == (len(through), pytest.approx(sum(through) / len(through)))


def test_seeking_what_is_new_finds_everything_in_the_end():
    found = mcts(Letters(), prompts_of(2), scorer, options=TreeOptions(num_simulations=60, num_expansions=4, rule="rmax"))
    assert all(sorted(path.text for path in result.paths) == every_solution() for result in found)
    assert not any(result.chains for result in found)


def test_a_search_ends_with_the_first_solution_that_is_enough():
    (prompt,), policy = prompts_of(1), Letters()
    (found,) = mcts(policy, [prompt], scorer, options=TreeOptions(num_simulations=40, num_expansions=2, enough=0.9))
    stems = [Stem(prompt, Path(steps=tuple(text), text=text), serial) for ((_, text, serial),) in policy.asked]
    best = [max(worth(prompt, policy.finish(stem, i).text) for i in (0, 1)) for stem in stems]
    assert 1 < len(best) < 40
    assert max(best[:-1]) < 0.9 <= best[-1] == found.score


@pytest.mark.parametrize("options", [{"num_simulations": 0}, {"rule": "ucb"}, {"prior": "uniform"}])
def test_tree_options_are_checked(options):
    (name,) = options
    with pytest.raises(ValueError, match=name):
        TreeOptions(**options)


# --- votes, ties, nothing -----------------------------------------------------------------------------------------


def whole(*texts):
    return [Path(tuple(map(ord, text)), text=text, finish_reason="stop") for text in texts]


def test_votes_are_counted_and_ties_go_to_the_first():
    paths = whole("1", "2", "2", "1", "3")
    assert voted(paths, list("12213"), [1.0] * 5).best == 0
    assert voted(paths, list("12213"), [1.0] * 5).scores == [0.4, 0.4, 0.4, 0.4, 0.2]
    heavy = voted(paths, list("12213"), [0.1, 0.5, 0.5, 0.1, 0.9])
    assert (heavy.path.text, heavy.score) == ("2", pytest.approx(1 / 2.1))
    silent = voted(paths, [None] * 5, [1.0] * 5)
    assert (silent.best, math.isnan(silent.score)) == (0, True)
    assert voted(paths, [None, "2", None, None, "3"], [9.0, 1.0, 1.0, 1.0, 2.0]).best == 4
    assert voted(whole("1", "2"), ["1", "2"], [0.0, 0.0]).best == 0


def test_a_score_that_is_missing_ranks_last():
    def some(prompts, paths):
        return [None if "a" in path.text else math.nan if "b" in path.text else worth(prompts[0], path.text) for path in paths]

    (found,) = best_of_n(Letters(), prompts_of(1), some, n=200)
    assert found.path.text == "ccc"
    assert found.num_tokens == 600
    (voice,) = weighted_vote(Letters(), prompts_of(1), some, lambda text: text, n=200)
    assert voice.path.text == "ccc"
    (beam,) = beam_search(Letters(), prompts_of(1), some, num_beams=2, num_expansions=3)
    assert beam.path.text == "ccc"


@pytest.mark.parametrize("missing", [None, math.nan])
def test_a_scorer_without_any_score_leaves_the_first_solution(missing):
    def nothing(prompts, paths):
        return [missing] * len(paths)

    prompts, options = prompts_of(2), TreeOptions(num_simulations=4)
    for results in (
        best_of_n(Letters(), prompts, nothing, n=3),
        beam_search(Letters(), prompts, nothing),
        mcts(Letters(), prompts, nothing, value=nothing, options=options),
        mcts(Letters(), prompts, nothing, options=options),
    ):
        assert [result.best for result in results] == [0, 0]
        assert all(math.isnan(result.score) for result in results)


def test_a_scorer_must_answer_for_every_path():
    with pytest.raises(ValueError, match="one number for each of 3 paths, got 1"):
        beam_search(Letters(), prompts_of(1), lambda prompts, paths: [0.5], num_beams=1, num_expansions=3)


def test_nothing_to_search_is_nothing_found():
    assert best_of_n(Letters(), [], scorer) == []
    assert majority_vote(Letters(), [], str) == []
    assert beam_search(Letters(), [], scorer) == []
    assert mcts(Letters(), [], scorer, value=scorer) == []


# --- over the engine ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return arithmetic.build_tokenizer()


@pytest.fixture(scope="module")
def model():
    return ready(llama(vocab_size=15))


def problems(tokenizer, *texts):
    return [Prompt(tokenizer(text).input_ids, text, {}, index) for index, text in enumerate(texts)]


PARAMS = SamplingParams(temperature=1.0, max_tokens=12, seed=3, ignore_eos=True)
GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
TEXTS = ("12+34=", "9", "99+99=", "1+1=2+")


def digits(prompts, paths):
    """The share of even digits."""
    return [sum(c in "02468" for c in path.text) / len(path.text) if path.text else None for path in paths]


@pytest.mark.parametrize("cut", [{"separator": "+"}, {"separator": "", "max_step_tokens": 1}, {"separator": "=", "max_step_tokens": 3}])
def test_steps_in_a_row_are_the_whole_solution(model, tokenizer, cut):
    prompts = problems(tokenizer, *TEXTS)
    policy = Policy(Engine(model, tokenizer, block_size=2), GREEDY, **cut)
    at_once = [own[0] for own in policy.complete([Stem(prompt) for prompt in prompts], 1)]
    for prompt, expected in zip(prompts, at_once, strict=True):
        path = Path()
        while not path.finished:
            behind, path = path, policy.step([Stem(prompt, path)], 1)[0][0]
            assert path == policy.first_step(expected, behind)
        assert path == expected
        assert (path.ends, path.steps, path.text, path.finish_reason) == (
            expected.ends,
            expected.steps,
            expected.text,
            expected.finish_reason,
        )
        assert path.logprobs == pytest.approx(expected.logprobs, abs=1e-5)
        assert path.text == tokenizer.decode(path.ids, skip_special_tokens=True)


def test_a_search_over_the_engine_does_not_depend_on_its_batch(model, tokenizer):
    prompts = problems(tokenizer, *TEXTS)

    def search(own):
        policy = Policy(Engine(model, tokenizer, block_size=2), PARAMS, separator="", max_step_tokens=3)
        beams = beam_search(policy, own, digits, num_beams=2, num_expansions=3)
        trees = mcts(policy, own, digits, value=digits, options=TreeOptions(num_simulations=4, num_expansions=2))
        rolled = mcts(policy, own, digits, options=TreeOptions(num_simulations=2, num_expansions=2))
        return [
            [(r.paths, r.scores, r.best, r.num_tokens, r.num_scored) for r in found] for found in zip(beams, trees, rolled, strict=True)
        ]

    together = search(prompts)
    assert together == [search([prompt])[0] for prompt in prompts]
    assert all(len(path.ids) <= 12 for own in together for found in own for path in found[0])


def test_branches_are_forwarded_once(model, tokenizer):
    """Blocks of one token: a stem costs its last token, which nobody has forwarded yet, and each further token of a step one decode."""
    (prompt,) = problems(tokenizer, "12+34=")
    engine = Engine(model, tokenizer, block_size=1)
    policy = Policy(engine, PARAMS, separator="", max_step_tokens=2)
    (found,) = beam_search(policy, [prompt], digits, num_beams=3, num_expansions=2)
    rounds = 12 // 2
    assert engine.stats.decoded_tokens == found.num_tokens == 6 * 2 + (rounds - 1) * 3 * 2 * 2
    assert engine.stats.prompt_tokens == len(prompt.ids) + (rounds - 1) * 3
    assert engine.stats.cached_tokens == sum(3 * (len(prompt.ids) + 2 * done - 1) for done in range(1, rounds))
    assert engine.num_used_blocks == 0


@pytest.mark.parametrize("value", [digits, None])
def test_trees_are_forwarded_once(model, tokenizer, value):
    """The cache holds every branch, however often the search comes back to it: a node that is gone on from costs its last token."""
    prompts = problems(tokenizer, *TEXTS)
    engine = Engine(model, tokenizer, block_size=1)
    policy = Policy(engine, PARAMS, separator="", max_step_tokens=3)
    calls, draw = [], policy._draw
    policy._draw = lambda stems, *given: calls.append(stems) or draw(stems, *given)
    found = mcts(policy, prompts, digits, value=value, options=TreeOptions(num_simulations=5, num_expansions=2))
    stems = [stem for own in calls for stem in own]
    assert engine.stats.prompt_tokens == sum(len(prompt.ids) for prompt in prompts) + len(stems) - len(prompts)
    assert engine.stats.cached_tokens == sum(len(stem.prompt.ids) + len(stem.path.ids) - 1 for stem in stems if stem.path.ids)
    assert engine.stats.decoded_tokens == sum(result.num_tokens for result in found)


def test_a_solution_ends_where_it_says(model, tokenizer):
    prompts = problems(tokenizer, *TEXTS)
    engine = Engine(model, tokenizer)
    at_once = Policy(engine, SamplingParams(max_tokens=4, seed=0, stop_token_ids=range(15)), separator="+")
    for (path,) in at_once.step([Stem(prompt) for prompt in prompts], 1):
        assert (path.text, path.steps, path.finish_reason, len(path.ids)) == ("", ("",), "stop", 1)
    (result, *_) = beam_search(at_once, prompts, digits)
    assert (result.path.text, math.isnan(result.score)) == ("", True)
    (result, *_) = mcts(at_once, prompts, digits, value=digits)
    assert (result.path.text, result.num_tokens) == ("", 4)


def test_a_stop_string_across_two_steps_ends_the_solution(model, tokenizer):
    prompts = problems(tokenizer, *TEXTS)
    free = Policy(Engine(model, tokenizer), GREEDY, separator="", max_step_tokens=1)
    for prompt, (path,) in zip(prompts, free.complete([Stem(prompt) for prompt in prompts], 1), strict=True):
        stop = path.text[3:5]
        if len(stop) < 2:
            continue
        params = SamplingParams(temperature=0.0, max_tokens=12, stop=stop)
        policy = Policy(Engine(model, tokenizer), params, separator="", max_step_tokens=1)
        stepwise = Path()
        while not stepwise.finished:
            stepwise = policy.step([Stem(prompt, stepwise)], 1)[0][0]
        assert (stepwise.text, stepwise.finish_reason) == (path.text[: path.text.find(stop)], "stop")
        assert stepwise.text == policy.complete([Stem(prompt)], 1)[0][0].text


def test_a_solution_ends_with_the_longest_sequence(tokenizer):
    model = ready(llama(vocab_size=15, max_position_embeddings=16))
    prompts = problems(tokenizer, "12+34+56=")
    policy = Policy(Engine(model, tokenizer), SamplingParams(max_tokens=50, seed=0, ignore_eos=True), separator="", max_step_tokens=2)
    (found,) = beam_search(policy, prompts, digits, num_beams=2, num_expansions=2)
    assert {len(path.ids) for path in found.paths} == {16 - len(prompts[0].ids)}
    assert {path.finish_reason for path in found.paths} == {"length"}


def test_a_policy_is_checked(model, tokenizer):
    with pytest.raises(ValueError, match="tokenizer"):
        Policy(Engine(model), PARAMS)
    with pytest.raises(ValueError, match="min_tokens must be 0, got 2"):
        Policy(Engine(model, tokenizer), SamplingParams(min_tokens=2))
    with pytest.raises(ValueError, match="max_step_tokens"):
        Policy(Engine(model, tokenizer), PARAMS, max_step_tokens=-1)
