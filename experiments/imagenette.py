"""The blog's comparison on all of Imagenette, with the controls it lacks; read by nbs/tutorials/winning_the_lottery and nbs/explains/what_a_ticket_knows.

    make reproduce                                            # everything that is not there yet
    .venv/bin/python experiments/imagenette.py                # what there is, and what each part still costs
    .venv/bin/python experiments/imagenette.py blog:0,1 far   # two seeds of one part side by side, all seeds of another one by one

A seed's results go to experiments/imagenette/<part>/ when it is done and are not run again; states go to runs/imagenette, from where
a run that was stopped goes on.

Recipes and questions were fixed before the first run. What was changed or added later, and after what had been seen:

- That the post trains on mirrored and cropped images, which its text does not say and its notebook does, was found when four of five seeds of `plain` and
  two of three of `plain_one_cycle` had been run as the blog's recipe. These parts end there, and the others take the post's images.
- `blog_one_cycle` was planned without controls; `reinit`, `shuffled` and `dense_long` were added when `plain_one_cycle` had been run, and before anything of its own.
- `128px` was planned with the ticket from epoch 1 as in the other parts; it got the post's, with longer rounds, when the post's images were found. Its precision was changed
  twice: to bfloat16, like that of `far`, when two seeds of `bf16` had been run; and back to float32, as the post computed, when one epoch of its dense network had been, because
  bfloat16 was slower on the machine at hand.
- Fine-tuning trained on the order and the crops of the first five epochs in every round, until its first seed had a lower training loss than longer training and a
  higher one in validation; it was mended in the library and run anew.
- `ahead` and `masks.csv` ask what training losses left open, `untrained` and `plain_untrained` what those of `ahead` did; `ahead` was ended with the other parts on images as they are, after two seeds of three.
  A supermask was validated with the statistics that batch norm begins with, which say nothing of an untrained network, until just before the first results of `ahead` were kept.
  The shuffled mask in `masks.csv` was asked when a reader missed it, after four of five seeds of `untrained`.
"""
import os
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pandas as pd

from lth_nb.all import (Experiment, Recipe, Results, Sparsifier, dense, dense_long, finetune, geometric, imagenette_learner, imp, iterative, one_shot_ticket, recount_norm,
                        reinit, shuffled, supermask, twin)

HERE = Path(__file__).with_suffix('')

PLAIN = Recipe(imagenette_learner, epochs=5, lr=1e-3, options=dict(size=64, bs=64, opt='fused_adam'))
BLOG = PLAIN.with_options(flip=True, min_scale=.35)
PLAIN_ONE_CYCLE = replace(PLAIN, anneal='one_cycle')

EARLY, LATE, AT_ONCE = imp(), imp(rewind_epoch=1), one_shot_ticket()
LONGER, STEP_37 = imp(rewind_epoch=1, full_epochs=True), imp(rewind_step=37)
WITH_CONTROLS = [dense(), EARLY, LATE, reinit(of=EARLY), shuffled(of=LATE), dense_long(of=EARLY)]
UNTRAINED = [dense(), EARLY, LATE, supermask(of=EARLY, levels='all'), supermask(of=LATE, levels='all'), supermask(of=AT_ONCE)]

PARTS = {
    # is there a gain, and beyond what the controls reach?
    'blog': Experiment(BLOG, WITH_CONTROLS, iterative, 50, range(5)),
    # the same with a learning rate that ends low
    'blog_one_cycle': Experiment(replace(BLOG, anneal='one_cycle'), WITH_CONTROLS, iterative, 50, range(3)),
    # what the optimizer, the blog's longer rounds and plain fine-tuning do
    'rounds': Experiment(BLOG, [dense(), finetune(of=EARLY), LONGER, imp(optimizer='keep')], iterative, 50, range(3)),
    # the blog's three arms at its size of images
    '128px': Experiment(BLOG.with_options(size=128), [dense(), EARLY, LONGER], iterative, 50, range(1)),
    # how far can one prune?
    'far': Experiment(replace(BLOG, precision='bf16'), [dense(), EARLY, STEP_37, LATE, reinit(of=STEP_37, levels='all'), shuffled(of=STEP_37, levels='all')], geometric(n_steps=6), 100*(1 - .5**6), range(2)),
    # what do the masks of `blog` and `plain` know before any training? Of `plain`, the seeds whose states were still there
    'untrained': Experiment(BLOG, UNTRAINED, iterative, 50, range(5)),
    'plain_untrained': Experiment(PLAIN, UNTRAINED, iterative, 50, (2, 3)),
    # the first two questions on images as they are
    'plain': Experiment(PLAIN, WITH_CONTROLS, iterative, 50, range(4)),
    'plain_one_cycle': Experiment(PLAIN_ONE_CYCLE, [dense(), EARLY, LATE], iterative, 50, range(2)),
    # why a ticket is ahead in training: by the order of the images, by its mask on any weights, by its mask on its own weights before any training?
    'ahead': Experiment(PLAIN_ONE_CYCLE, [dense(), EARLY, twin(of=EARLY, levels='last'), reinit(of=EARLY), supermask(of=EARLY, levels='all'), supermask(of=AT_ONCE)], iterative, 50, range(2)),
    # what bfloat16 costs, beside the dense networks of `plain`
    'bf16': Experiment(replace(PLAIN, precision='bf16'), [dense()], iterative, 50, range(3)),
}


def done(part):
    "The results of a part that are there, or None."
    return Results.load(HERE/part) if (HERE/part/'results.json').exists() else None


def arms_left(part, seed):
    "The arms of a part that are still to run for a seed."
    found = done(part)
    there = {(r['arm'], r['seed']) for r in found.rows} if found else set()
    return tuple(a for a in PARTS[part].arms if (a.name, seed) not in there)


def seeds_left(part):
    "The seeds of a part of which an arm is still to run."
    return [s for s in PARTS[part].seeds if arms_left(part, s)]


def groups(part, seeds):
    "Seeds that can run side by side, for they lack the same arms: (arms, seeds) of each group."
    found = {}
    for s in seeds: found.setdefault(arms_left(part, s), []).append(s)
    return [group for group in found.items() if group[0]]


def run(part, arms, seeds, n_jobs):
    "Run some arms of a part for some seeds, and put them with the results that are there."
    found = replace(PARTS[part], arms=arms, seeds=seeds).run('runs/imagenette', n_jobs)
    if found.failed: raise SystemExit(f'{part}, seeds {seeds}: {found.failed}')
    there = done(part)
    (there + found if there else found).save(HERE/part)


def known(part, seed):
    "What a seed's masks know before any training: percent right with the initial weights, of training images (full batches, as they are served) and of validation images."
    exp = replace(PARTS[part], arms=[EARLY, supermask(of=AT_ONCE)], seeds=[seed])
    found, make = exp.run('runs/imagenette', os.cpu_count()), exp.recipe.make
    by_size = Sparsifier(make(seed).model)
    by_size.prune(50)
    ticket = found.mask(EARLY.name, 3, seed)
    masks = {'none': None, 'large initial weights': by_size.mask, 'ticket, cut at once': found.mask(supermask(of=AT_ONCE).name, 3, seed), 'ticket, in three rounds': ticket,
             'shuffled within layers': ticket.shuffled(seed)}
    for name, mask in masks.items():
        learn = make(seed)
        if mask is not None: mask.hold(dict(learn.model.named_parameters()))
        recount_norm(learn, seed)
        with learn.no_bar(), learn.no_logging(): train, valid = (100*learn.validate(dl=dl)[1] for dl in learn.dls)
        yield dict(part=part, mask=name, seed=seed, train=train, valid=valid)


def write_known(part):
    "Add the seeds of a part that are new to masks.csv."
    def there(): return pd.read_csv(HERE/'masks.csv') if (HERE/'masks.csv').exists() else pd.DataFrame(columns=['part', 'seed'])
    new = {r['seed'] for r in done(part).rows} - set(there().query('part == @part').seed)
    rows = [row for s in sorted(new) for row in known(part, s)]
    if rows: pd.concat([there(), pd.DataFrame(rows)]).drop_duplicates(['part', 'mask', 'seed']).to_csv(HERE/'masks.csv', index=False, float_format='%.2f')


def asked(name):
    "What `part` or `part:0,1` on the command line means: the part, and lists of seeds that can run side by side."
    part, _, seeds = name.partition(':')
    if part not in PARTS: raise SystemExit(f'there is no part {part!r}: give {", ".join(PARTS)} or all')
    if not seeds: return part, [[s] for s in PARTS[part].seeds]
    none = [s for s in seeds.split(',') if s not in map(str, PARTS[part].seeds)]
    if none: raise SystemExit(f'{part} has no seed {", ".join(none)}: give some of {list(PARTS[part].seeds)}')
    return part, [[int(s) for s in seeds.split(',')]]


def main(wanted):
    warnings.filterwarnings('ignore', category=FutureWarning)
    if not wanted:
        for part, exp in PARTS.items(): print(f'{part}: seeds left {seeds_left(part)} of {list(exp.seeds)}; {exp.plan("runs/imagenette").note}')
    for part, together in [asked(name) for name in (PARTS if wanted == ['all'] else wanted)]:
        for arms, some in (group for t in together for group in groups(part, t)): run(part, arms, some, os.cpu_count())
        if supermask(of=AT_ONCE).name in [a.name for a in PARTS[part].arms] and done(part): write_known(part)


if __name__ == '__main__': main(sys.argv[1:])
