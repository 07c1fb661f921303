"""
Training a system: the trainers, what decides a stage, and the audit.

The trainers, and what they are put together from:

- `trainer`: `S3TTrainer`.
- `sft_trainer`: `S3TSFTTrainer`.
- `dpo_trainer`: `S3TDPOTrainer`.
- `reward_trainer`: `S3TRewardTrainer`.
- `kto_trainer`: `S3TKTOTrainer`.
- `preference`: which rows they take, and what the reference says of a row by itself.
- `reference`: the base as the reference, and the ensemble as what is asked how likely a text is.
- `host`: the trainer class below the mixin: what it takes, what it makes of a base, what it keeps.
- `hosted`: the part of a trainer that keeps that to the stage in training.
- `named_base`: a base that is given by its name.
- `trainer_mixin`: what their parts share.
- `plan_run`: the stages of a plan, one after the other.
- `limits`: how far a call goes.
- `first_process`: does for all what it alone does, and tells the others where it fails.
- `shared_work`: takes stages among other trainers on the folder, and waits for them.
- `assigned`: stages that somebody else chose, for workers of a cluster.
- `stage_run`: one run of `Trainer.train`, which makes one stage.
- `stage_memory`: brings in the stages below, and takes out the one that was trained.
- `evaluation`: with the ensemble, or with the stack so far.
- `live_model`: the model that serves beside a trainer.
- `publishing`: pushes at the end, or as sequences complete.
- `audit`: trains surviving stages again and compares them bit for bit.

Before anything is changed or written:

- `elsewhere`: where its folder lies, when a cluster decides that.
- `blueprint`: what a trainer knows of its system, and the order of the checks.
- `inputs`: what was given that is of another kind, left out, or in vain.
- `refusals`: arguments, accelerators and datasets that would break isolation.
- `early_checks`: what `Trainer` would find out in a stage's first steps.
- `stage_sizes`: how many steps stages get, and what is too few.

What decides a stage:

- `circumstances`: the recipe and what else must be the same for the same bits.
- `parts`: what of a recipe is no argument: loss, collator, tokenizer, callbacks.
- `descriptions`: how such objects are described, the same in every process.
- `bytecode`: what code of the user's names, sets and holds.
- `library_code`: whether code is an installed library's or the user's.
- `accelerator`: the settings of an accelerator that decide how it trains.
- `optimizers`: whose parameters optimizers train, which weights they serve, what a checkpoint brings back.
- `stage_records`: what a stage is made from, and whether another trainer would make it so.
- `additions`: rows that come later, or take the place of others.
- `arriving`: which rows of a dataset these are, and where they go.
- `rows`: the rows of a training dataset: ids, groups, digests, and what a stage gets.
- `gate_rows`: what a gate is made of: the words of the prompts of rows.
- `dataset_rows`: the rows of a dataset of any kind, as they are stored and as it shows them.
- `own_fields`: what a table adds to a row because of other rows, taken away before texts are made of it.
- `fed_rows`: rows as the model gets them, by which evaluation sets are compared with training examples.
- `sampler`: which of a stage's examples an epoch takes, and their order.

While a stage trains:

- `fresh_parts`: copies by which each stage finds what was given as it was given.
- `prepared_base`: undoes what `Trainer` and Accelerate do to a base.
- `checkpoints`: inside a stage: whether a resume is exact, and reading them.
- `stage_watch`: what is noted of a stage: what it draws, leaves, and what is not finite.
- `divergence`: a stage that is no numbers any more, noticed and refused.
- `progress`: one bar for the whole plan.
- `curve`: one curve of steps over all stages.
- `tracking`: one run for trackers.
"""
