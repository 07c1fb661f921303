"""
A system in production: it answers over HTTP, forgets while it answers, and takes up what is grown again.

- `running`: what `hf-s3t serve` runs.
- `settings`: where it listens, what it batches, what it refuses.
- `service`: what all routes share.
- `app`: all routes, behind what lets requests in.
- `keys`: keys and their scopes.
- `access`: who is let in.
- `limits`: how large a body is, and how long it may take.
- `problems`: errors as clients of OpenAI's API expect them.
- `measuring`: what is told of requests and batches.
- `engine`: vLLM behind the server, for systems of one shard.

Answers:

- `models`: the one model that is served.
- `completions`: what comes after a text.
- `chat`: what comes next in a chat.
- `classify`: what texts or images are.
- `schemas`: what clients send and get.
- `prompts`: from texts and chats to tokens.
- `asking`: what a request asks of its rows.
- `answers`: from rows to a response, collected or streamed.
- `batching`: which rows go through the model together.
- `rows`: a row of a batch that generates.
- `row_text`: the text of one answer as its tokens come.
- `generation`: a batch through `model.generate`.
- `classification`: a batch through a classifier.

Erasures, and watching:

- `erasures`: the routes that erase, each request once however often it comes.
- `erasure_schemas`: what who erases sends and gets.
- `status`: where the system stands, and whether the server is ready.
- `watching`: the metrics of Prometheus.
- `logs`: JSON lines that name nobody.

For people:

- `pages`: the page at `/`, from the files in `page/`.
"""
