"""
vLLM behind the server, for systems of one shard: it answers, and this server decides with which stack.

- `address.py`: where an engine listens.
- `vllm.py`: what is asked of it beside answers: loading an adapter, letting go of one, the names that it has.
- `exports.py`: the folder of exports, and names that are used once.
- `names.py`: the name that requests are passed on to, and who is under way on which.
- `switching.py`: the change from one stack to the next, and what of it is confirmed.
- `model.py`: the system, which follows its folder and has the engine follow.
- `passing_on.py`: requests and streams, there and back.
"""
