"Arms are graphs of named segments: what is equal has one name, what differs another, and every stretch is counted once."
import math
import pickle
from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lth_nb.arms import (Anywhere, Arm, Grid, Pruned, Pruning, Segment, Shuffled, State, dense, dense_long, finetune, graph, imp, lr_rewind, n_trained, needs,
                         one_shot_ticket, random_mask, reinit, shuffled, supermask)
from lth_nb.criteria import criterion
from lth_nb.schedule import geometric, iterative

N, T = 10, 5 # batches an epoch, epochs
GRID = Grid(T, N, iterative.levels(50), lr=1e-3, last_lr=1e-3)
ANNEALED = replace(GRID, anneals=True, last_lr=1e-5)
T0, T1 = imp(), imp(rewind_epoch=1)


def states(*arms, grid=GRID, seeds=(0,)): return [a.make(grid, seed, level) for seed in seeds for a in arms for level in a.levels_in(grid)]
def epochs(*arms, **kwargs): return n_trained(states(*arms, **kwargs))/N


# ------------------------------------------------------------------ names

VALUES = dict(seed=[0, 1], init=[None, 0, 1], start=[None, State(Segment(0), 10), State(Segment(0), 20), State(Segment(1), 10)], begin=[0, 10], optimizer=['fresh', 'keep'],
              mask=[None, Pruned(State(Segment(0), 50), 50., Pruning()), Pruned(State(Segment(0), 50), 60., Pruning()), Pruned(State(Segment(0), 50), 50., Pruning('row')),
                    Shuffled(Pruned(State(Segment(0), 50), 50., Pruning()), 0), Shuffled(Pruned(State(Segment(0), 50), 50., Pruning()), 1), Anywhere(Pruned(State(Segment(0), 50), 50., Pruning()), 0)],
              carried=[None, State(Segment(0), 50)], span=[None, 5, 6], lr=[None, 1e-3])
segments = st.builds(Segment, **{n: st.sampled_from(v) for n, v in VALUES.items()})


def test_every_field_of_a_segment_was_thought_of(): assert {f.name for f in fields(Segment)} == set(VALUES)


@settings(max_examples=200, deadline=None)
@given(segments, segments)
def test_segments_are_one_where_all_is_equal(a, b):
    alike = all(getattr(a, f.name) == getattr(b, f.name) for f in fields(Segment))
    assert (a == b) == (a.name == b.name) == alike and (hash(a) == hash(b)) == alike
    assert pickle.loads(pickle.dumps(a)) == a and State(a, 10) != State(a, 20) and len({State(a, 10), State(a, 10), a}) == 2


def test_segment_and_state_with_the_same_fields_are_two_things():
    mask = Pruned(State(Segment(0), 50), 50., Pruning())
    assert len({Shuffled(mask, 1), Anywhere(mask, 1)}) == 2 and Shuffled(mask, 1).name != Anywhere(mask, 1).name


def test_all_of_pruning_is_in_the_name_of_a_mask():
    @criterion
    def other(now): return now
    first, trained = Pruning(), State(Segment(0), 50)
    others = [Pruning('row'), Pruning(context='local'), Pruning(criteria='movement'), Pruning(criteria=other), Pruning(layers=['0']), Pruning(ignore='0'), Pruning(rates={'0': 50}), Pruning(allow_empty=True)]
    assert len({Pruned(trained, 50., how).name for how in [first, *others]}) == 1 + len(others) == 1 + len(fields(Pruning)) + 1
    assert Pruned(trained, 50., Pruning(criteria='large_final')) == Pruned(trained, 50., first)


@pytest.mark.parametrize('grid', [GRID, ANNEALED], ids=['constant', 'annealed'])
def test_seeds_share_nothing(grid):
    arms = [dense(), T0, T1, reinit(of=T0), shuffled(of=T1), random_mask(of=T0), dense_long(of=T1), lr_rewind(1), finetune(of=T1), one_shot_ticket(1)]
    first, second = (graph(states(*arms, grid=grid, seeds=[s])).keys() for s in (0, 1))
    assert len(first) == len(second) and not first & second
    for control in (shuffled, random_mask): assert len({control(of=T0).make(grid, s, 3).segment.mask.seed for s in range(10)}) == 10, 'positions are drawn anew for each seed'


# ------------------------------------------------------------------ what arms share

def test_the_first_round_of_every_ticket_is_the_dense_run():
    for arm in (T0, T1, lr_rewind(), finetune(), one_shot_ticket(2), imp(optimizer='keep')): assert dense().make(GRID, 0, 0) in {s for state in states(arm) for segment in graph([state]) for s in needs(segment)}


def test_a_fresh_optimizer_and_one_restored_at_initialisation_are_the_same():
    assert states(imp(optimizer='restore')) == states(T0) and states(imp(1, optimizer='restore')) != states(T1)
    assert states(imp(optimizer='keep')) != states(T0)


def test_epochs_and_steps_are_two_ways_to_say_one_position():
    assert states(imp(rewind_epoch=1)) == states(imp(rewind_step=10)) and states(imp(rewind_epoch=.25)) == states(imp(rewind_step=3)) # 2.5, half up
    assert imp(rewind_epoch=.25).rewind.in_epochs(GRID) == .3


@pytest.mark.parametrize('at', [dict(), dict(rewind_epoch=.5), dict(rewind_step=3)])
def test_full_epochs_change_nothing_within_the_first_epoch(at): assert states(imp(full_epochs=True, **at)) == states(imp(**at))


def test_rounds_end_at_T_or_after_T_epochs():
    assert {s.batch for s in states(T1)} == {50} and {s.batch for s in states(imp(1, full_epochs=True))} == {60} and {s.batch for s in states(imp(rewind_step=13, full_epochs=True))} == {60}
    assert {s.segment.begin for s in states(imp(rewind_step=13, full_epochs=True))} == {13}


def test_learning_rate_rewinding_goes_back_and_fine_tuning_goes_on():
    "Images that are cut out at random are others in each epoch: who trained on those of the first five in every round would see no others."
    assert [(s.segment.begin, s.batch) for s in states(lr_rewind(1))] == [(10, 50)]*3 and [(s.segment.begin, s.batch) for s in states(finetune(of=T1))] == [(50, 90), (90, 130), (130, 170)]
    a, b = states(lr_rewind(1), grid=ANNEALED), states(finetune(of=T1), grid=ANNEALED)
    assert {s.segment.span for s in a} == {5} and {(s.segment.span, s.segment.lr) for s in b} == {(None, 1e-5)}


def test_fine_tuning_takes_the_epochs_of_the_ticket_in_whole():
    assert states(finetune(of=T1)) == states(finetune(epochs=4)) == states(finetune(of=T1, lr=1e-3)) == states(finetune(of=imp(rewind_step=13))) != states(finetune(of=T1, lr=2e-3))
    assert states(finetune()) == states(finetune(of=T0)) == states(finetune(of=imp(1, full_epochs=True))) and states(finetune(epochs=7))[0].batch == 50 + 70


def test_fine_tuning_of_what_is_not_trained_asks_for_epochs():
    own = Arm('own', lambda grid, seed, level: State(Segment(seed, mask=T0.make(grid, seed, level).segment.mask), 0))
    with pytest.raises(ValueError, match='of=own is not trained: say by epochs='): states(finetune(of=own))
    assert states(finetune(of=own, epochs=2))[0].batch == 50 + 20


def test_masks_build_on_the_level_before_or_on_dense():
    last, at_once = T0.make(GRID, 0, 3).segment.mask.trained, one_shot_ticket().make(GRID, 0, 3).segment.mask.trained
    assert last == T0.make(GRID, 0, 2) and at_once == dense().make(GRID, 0, 0)
    assert T0.make(GRID, 0, 1) == one_shot_ticket().make(GRID, 0, 1)


@pytest.mark.parametrize('ticket', [T0, T1, one_shot_ticket(1)])
@pytest.mark.parametrize('level', [1, 3])
def test_a_control_changes_one_thing(ticket, level):
    state = ticket.make(GRID, 7, level)
    def differs(control): return {f.name for f in fields(Segment) if getattr(control.make(GRID, 7, level).segment, f.name) != getattr(state.segment, f.name)}
    assert differs(shuffled(of=ticket)) == differs(random_mask(of=ticket)) == {'mask'}
    assert differs(reinit(of=ticket)) - {'start', 'begin'} == {'init'} and differs(supermask(of=ticket)) <= {'start', 'begin'}
    assert reinit(of=ticket).make(GRID, 7, level).segment.start is None and reinit(of=ticket).make(GRID, 7, level).batch == 50
    assert supermask(of=ticket).make(GRID, 7, level).batch == 0
    long = dense_long(of=ticket).make(GRID, 7, level)
    assert long.segment == dense().make(GRID, 7, 0).segment and long.batch/N == math.ceil(n_trained([state])/N)


def test_the_long_dense_run_anneals_over_its_own_length():
    long = dense_long(of=T0).make(ANNEALED, 0, 3)
    assert long.segment.span == 20 and long.segment != dense().make(ANNEALED, 0, 0).segment and epochs(dense(), dense_long(of=T0), grid=ANNEALED) == 25


# ------------------------------------------------------------------ what they cost

COSTS = {'the blog, ending at T': ([dense(), T0, T1], 32), 'the blog, full epochs': ([dense(), T0, imp(1, full_epochs=True)], 35), 'dense': ([dense()], 5), 'ticket': ([T0], 20), 'inside an epoch': ([imp(rewind_step=3)], 5 + 3*4.7),
         'at once': ([one_shot_ticket(1)], 17), 'long': ([dense_long(of=T1)], 17), 'all levels': ([T0, reinit(of=T0, levels='all')], 35), 'untrained': ([supermask(of=T0)], 15), 'both': ([lr_rewind(2), finetune(epochs=3)], 5 + 2*9),
         'shared rewind points': ([T1, imp(1, optimizer='restore'), imp(1, optimizer='keep')], 5 + 9*4), 'two controls': ([T1, shuffled(of=T1), random_mask(of=T1)], 17 + 8)}


@pytest.mark.parametrize('name', COSTS)
def test_costs(name):
    arms, cost = COSTS[name]
    assert epochs(*arms) == pytest.approx(cost) and epochs(*arms, seeds=[0, 1, 2]) == pytest.approx(3*cost)


def test_a_rewind_point_alone_costs_the_way_to_it():
    assert n_trained([State(Segment(0), 13)]) == 13 and n_trained([State(Segment(0), 13), State(Segment(0), 10)]) == 13 and n_trained([State(Segment(0), 0)]) == 0


kinds = st.sampled_from([dense(), T0, T1, imp(.25), imp(rewind_step=13), imp(1, optimizer='keep'), one_shot_ticket(1), lr_rewind(1), finetune(epochs=2, lr=1e-4)])
controls = st.builds(lambda make, of, levels: make(of=of, levels=levels), st.sampled_from([reinit, shuffled, random_mask, dense_long, supermask]), st.sampled_from([T0, T1, imp(rewind_step=13)]), st.sampled_from(['all', 'last', [1]]))


@settings(max_examples=60, deadline=None)
@given(st.lists(kinds | controls, min_size=1, max_size=5), st.sampled_from([GRID, ANNEALED]))
def test_graphs_are_in_order_whole_and_counted_once(arms, grid):
    wanted = states(*arms, grid=grid)
    found = graph(wanted)
    place = {segment: i for i, segment in enumerate(found)}
    for segment, batches in found.items():
        for s in needs(segment): assert place[s.segment] < place[segment] and s.batch in found[s.segment]
        assert batches == sorted(set(batches)) and (max(batches) > segment.begin or max(batches) == 0)
    assert all(s.batch in found[s.segment] for s in wanted)
    assert n_trained(wanted) == sum(max(max(b) - s.begin, 0) for s, b in found.items()) <= sum(n_trained([s]) for s in wanted)
    assert n_trained(wanted + wanted) == n_trained(wanted) and n_trained(wanted[::-1]) == n_trained(wanted)


def test_many_levels_are_named_quickly():
    "30 levels, each of which needs the one before twice."
    grid = replace(GRID, sparsities=geometric(n_steps=30).levels(99))
    for arm in (lr_rewind(), imp(optimizer='keep')): assert len(graph(states(arm, grid=grid))) == 31


# ------------------------------------------------------------------ what cannot be

WRONG = {
    'both positions': (lambda: imp(rewind_epoch=1, rewind_step=37), 'rewind_epoch=1 and rewind_step=37 both say'),
    'epoch below 0': (lambda: imp(rewind_epoch=-1), 'rewind_epoch=-1'), 'epoch nan': (lambda: imp(rewind_epoch=math.nan), 'rewind_epoch=nan'), 'epoch inf': (lambda: imp(rewind_epoch=math.inf), 'rewind_epoch=inf'),
    'epoch text': (lambda: imp(rewind_epoch='1'), "rewind_epoch='1'"), 'epoch True': (lambda: imp(rewind_epoch=True), 'rewind_epoch=True'), 'epoch None': (lambda: imp(rewind_epoch=None), 'rewind_epoch=None'),
    'step below 0': (lambda: imp(rewind_step=-3), 'rewind_step=-3'), 'step not whole': (lambda: one_shot_ticket(rewind_step=1.5), 'rewind_step=1.5'), 'step text': (lambda: imp(rewind_step='a'), "rewind_step='a'"),
    'step True': (lambda: imp(rewind_step=True), 'rewind_step=True'), 'optimizer': (lambda: imp(optimizer='reset'), "optimizer='reset' is not a choice"), 'optimizer at once': (lambda: one_shot_ticket(optimizer=None), 'optimizer=None'),
    'lr below 0': (lambda: finetune(lr=-1), 'lr=-1'), 'lr 0': (lambda: finetune(lr=0), 'lr=0'), 'lr nan': (lambda: finetune(lr=math.nan), 'lr=nan'), 'lr text': (lambda: finetune(lr='1e-3'), "lr='1e-3'"),
    'epochs 0': (lambda: finetune(epochs=0), 'epochs=0'), 'epochs below 0': (lambda: finetune(epochs=-1), 'epochs=-1'), 'epochs text': (lambda: finetune(epochs='2'), "epochs='2'"), 'part of an epoch': (lambda: finetune(epochs=1.5), 'epochs=1.5 .* give a whole number'),
    'fine-tuning of dense': (lambda: finetune(of=dense()), 'of='), 'fine-tuning of a name': (lambda: finetune(of='imp'), "of='imp'"),
    'lr_rewind': (lambda: lr_rewind(-1), 'rewind_epoch=-1'),
    **{f'{control.__name__} of {what}': (lambda control=control, of=of: control(of=of), 'of=.*give the arm of a ticket')
       for control in (reinit, shuffled, random_mask, dense_long, supermask) for what, of in (('dense', dense()), ('a name', 'imp'), ('None', None), ('a control', reinit(of=T0)), ('the long run', dense_long(of=T0)))},
    'pruning granularity': (lambda: Pruning('neuron'), "granularity='neuron'"), 'pruning criteria': (lambda: Pruning(criteria=abs), 'criteria='), 'pruning context': (lambda: Pruning(context='everywhere'), "context='everywhere'"),
    'rewind to T': (lambda: states(imp(5)), 'rewinding to epoch 5 leaves nothing of 5 epochs'), 'rewind to almost T': (lambda: states(imp(4.99)), 'leaves nothing'), 'rewind beyond': (lambda: states(imp(rewind_step=51)), 'rewinding to step 51'),
    'full epochs, annealed': (lambda: states(imp(1, full_epochs=True), grid=ANNEALED), 'full_epochs=True trains beyond epoch T'),
    'levels': (lambda: states(reinit(of=T0, levels=[1, 4])), r'levels=\[1, 4\] of reinit of imp → initialisation: there are levels 1 to 3'), 'level -1': (lambda: states(reinit(of=T0, levels=[-1])), 'there are levels 1 to 3'),
}


@pytest.mark.parametrize('case', WRONG)
def test_wrong_arguments(case):
    make, said = WRONG[case]
    with pytest.raises(ValueError, match=said): make()


def test_names_say_what_arms_are():
    assert [str(a.name) for a in (dense(), T0, T1, imp(.25), imp(rewind_step=30))] == ['dense', 'imp → initialisation', 'imp → epoch 1', 'imp → epoch 0.25', 'imp → step 30']
    assert imp(1, full_epochs=True, optimizer='keep').name == 'imp → epoch 1, full epochs, optimizer keep' and shuffled(of=T1).name == 'shuffled of imp → epoch 1'
    assert all(make(**kwargs, name='mine').name == 'mine' for make, kwargs in [(imp, {}), (one_shot_ticket, {}), (lr_rewind, {}), (finetune, {}), *((c, dict(of=T0)) for c in (reinit, shuffled, random_mask, dense_long, supermask))])
    assert {a.kind for a in (reinit(of=T0), shuffled(of=T0), random_mask(of=T0), dense_long(of=T0), supermask(of=T0))} == {'control'} and finetune(of=T0).kind == lr_rewind().kind == 'baseline'
    different = [imp(), imp(1), imp(.25), imp(rewind_step=3), imp(full_epochs=True), imp(optimizer='keep'), one_shot_ticket(), one_shot_ticket(1), one_shot_ticket(optimizer='keep'), lr_rewind(), lr_rewind(1), finetune(), finetune(lr=1e-4), finetune(epochs=2), finetune(of=T1)]
    assert len({a.name for a in different}) == len(different), 'two arms of one experiment need two names'


def test_arms_pickle():
    "For clusters, and for results in other processes."
    for arm in (dense(), T1, one_shot_ticket(), reinit(of=T0), dense_long(of=T1), supermask(of=T0)): assert states(pickle.loads(pickle.dumps(arm))) == states(arm)
