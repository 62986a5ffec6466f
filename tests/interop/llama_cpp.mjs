// llama.cpp on the CPU, by its prebuilt library: one request as JSON on stdin, its answer on stdout.
//
//   {"file": "x.gguf", "prompts": [[1, 2], ...], "most": 24, "texts": ["...", ...]}
//   {"greedy": [[3, 4], ...], "tokens": [[5, 6], ...], "eos": 2, "template": "..."}
//
// Greedy continuations end with the end token, or after `most` tokens. Texts are tokenised with no
// token put before them, special tokens recognised.
import {createRequire} from "node:module";
import {readFileSync} from "node:fs";
import {pathToFileURL} from "node:url";

const home = createRequire(`${process.env.LLAMA_CPP_HOME}/node_modules/`);
const {getLlama, LlamaLogLevel} = await import(pathToFileURL(home.resolve("node-llama-cpp")));

const request = JSON.parse(readFileSync(0, "utf-8"));
const llama = await getLlama({
    gpu: false, build: "never", logLevel: LlamaLogLevel.warn,
    logger: (level, message) => process.stderr.write(`${level}: ${message}\n`)
});
const model = await llama.loadModel({modelPath: request.file, useMmap: true});
const longest = Math.max(0, ...request.prompts.map((prompt) => prompt.length)) + request.most;
// One sequence after the other, and room to spare: a context that is full drops its beginning.
const context = await model.createContext({sequences: 1, contextSize: longest + 64, threads: 2});
const sequence = context.getSequence();

async function greedy(prompt) {
    await sequence.clearHistory();
    const made = [];
    for await (const token of sequence.evaluate(prompt, {temperature: 0, yieldEogToken: true})) {
        made.push(token);
        if (made.length >= request.most || model.isEogToken(token))
            break;
    }
    return made;
}

const found = [];
for (const prompt of request.prompts)
    found.push(await greedy(prompt));
process.stdout.write(JSON.stringify({
    greedy: found,
    tokens: request.texts.map((text) => model.tokenize(text, true)),
    eos: model.tokens.eos,
    template: model.fileInfo.metadata.tokenizer.chat_template ?? null
}));
await model.dispose();
await llama.dispose();
