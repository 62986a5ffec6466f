// Tokens per second of llama.cpp on the CPU: node llama_cpp_rate.mjs FILE ROWS PROMPT_TOKENS TOKENS
//
// So many rows go on from a prompt of their own at once; their prompts are read before the clock
// starts. Prints one JSON object. LLAMA_CPP_HOME names the folder that has node-llama-cpp.
import {createRequire} from "node:module";
import {pathToFileURL} from "node:url";

const home = createRequire(`${process.env.LLAMA_CPP_HOME}/node_modules/`);
const {getLlama, LlamaLogLevel} = await import(pathToFileURL(home.resolve("node-llama-cpp")));
const [file, rows, promptTokens, tokens] =
    [process.argv[2], ...process.argv.slice(3, 6).map(Number)];

const llama = await getLlama({gpu: false, build: "never", logLevel: LlamaLogLevel.error});
const model = await llama.loadModel({modelPath: file, useMmap: true});
const context = await model.createContext({
    sequences: rows, contextSize: promptTokens + tokens + 32, batchSize: 512,
    threads: Number(process.env.THREADS ?? 2)
});
const sequences = Array.from({length: rows}, () => context.getSequence());
const prompt = (row) =>
    Array.from({length: promptTokens - 1}, (_, place) => 1000 + (37 * place + 101 * row) % 40000);
for (const [row, sequence] of sequences.entries())
    await sequence.evaluateWithoutGeneratingNewTokens(prompt(row));

async function decode(sequence) {
    let made = 0;
    for await (const _ of sequence.evaluate([1234], {temperature: 1, yieldEogToken: true})) {
        if (++made >= tokens)
            break;
    }
    return made;
}

const start = performance.now();
const made = await Promise.all(sequences.map(decode));
const seconds = (performance.now() - start) / 1000;
const total = made.reduce((sum, count) => sum + count, 0);
process.stdout.write(JSON.stringify({rows, tokens: total, tokens_per_s: total / seconds}) + "\n");
process.exit(0);
