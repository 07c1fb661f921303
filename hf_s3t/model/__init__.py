"""
The model that serves a system: its base, its stacks of adapters, answers and deletions.

`S3TModel` and what it is put together from:

- `modeling`: the class itself, what users call.
- `loading`: the steps of loading before there is a model.
- `model_class`: the class of a served model, made for the class of its base.
- `answering`: one answer from the members.
- `gates`: how much each shard knows of a prompt, from what is in.
- `weighing`: asks the gate, once for each prompt, or takes what it is told.
- `generating`: one answer at each step of `generate`.
- `following`: keeps the stages in memory, and which of them answer, in step with the folder.
- `unlearning`: forgets, now or later, while others call.
- `handing_out`: copies, pushes and exports.

The base model:

- `layers`: its transformer layers, found by structure and grouped for stages.
- `task`: its task, told by its class.
- `head`: its head, found by structure and started from a seed.
- `base_record`: what a system records of its base.
- `base_loading`: loads a base as it was recorded.
- `base_recognition`: whether a base is the one that was trained on.
- `base_tensors`: a base's tensors in one order, and their digests.
- `base_precision`: in which precision tensors are held.
- `quantisation`: bases that are quantised.
- `checkpoint`: what of a base its checkpoint holds.
- `tokenizer_settings`: how tokenizers are set, noted and put back.

What is refused:

- `refusals`: bases and PEFT settings that would break isolation.
- `targets`: what a PEFT config names that stages cannot adapt.
- `stateless`: bases that keep state from one pass to the next, found by trying.

Stacks of adapters, over PEFT:

- `skeleton`: a base as modules without weights, where another process answers.
- `stack`: `StageStack`: attach, train one with the rest frozen, route, drop.
- `stage_configs`: the PEFT config of each stage.
- `stage_files`: the files of a stage, or of a whole stack.
- `tensor_files`: tensors from the bytes of files.
- `sections`: what of the base concerns one group of layers.
- `adapter_places`: where an adapter's tensors lie in the base.
- `peft_layers`: what PEFT puts there, as types.
- `plain_adapter`: what plain PEFT makes of a stage's files, compared with what is in memory.
- `route`: which adapters the rows of a batch go through.
- `routed_layers`: adapted layers and heads that go by it.
- `joined_adapters`: those of several members in one piece of memory, for one product.
- `batches`: the rows of a call, repeated for every member.
- `gating`: which members answer which rows of a call.
- `gated_pass`: a pass in which each member computes only those.
- `shared_pass`: whether the members can share one pass of the base.
- `trunk`: what lies below every stage of a route, computed once and cached once.
- `uncompiled`: functions that no compiled graph takes in.
- `aggregation`: how the members' answers become one.
- `ensemble_loss`: the loss of that answer.
- `caches`: whose a cache of keys and values is, and whether it may still be used.

Calls, threads and state:

- `calls`: the calls under way; a deletion waits for those on the old routing, or stops them.
- `turns`: who has the base, a stage in training or calls.
- `streaming`: whoever reads from a streamer gets an end.
- `retrying`: work that is done beside, and tried again until it is done.
- `scope`: context variables that end with their block.
- `randomness`: the random states of the process, put back and kept apart.
- `modes`: whether modules train or evaluate, put aside for a while.
- `module_state`: what modules hold besides parameters.
- `call_watch`: what calls leave there.
- `marks`: what there is to see of an object, compared with an earlier look.
- `fresh_copies`: copies of collators, losses, callbacks and datasets, for each stage its own.
"""
