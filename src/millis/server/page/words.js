// Every text of the page in its languages, and putting them into the document.

import { recall } from "./store.js";

export const WORDS = {
  en: {
    skip: "Skip to the message box", pageTools: "Page", newChat: "New chat", language: "Language", panels: "Load and settings",
    theme: { auto: "Theme: system", light: "Theme: light", dark: "Theme: dark" },
    conversation: "Conversation", messages: "Messages", sideLabel: "Load and settings",
    welcome: "What can be answered in time?",
    welcomeMore: "Set a deadline, ask, and see where every millisecond went.",
    examples: ["Give me three tips for a good night's sleep.", "What is the capital of France?", "Write a short note of thanks to a colleague."],
    deadline: "Deadline", none: "none", onDeadline: "When short", partial: "Shorten the answer", fallback: "Send the fallback",
    error: "Send an error", fallbackText: "Fallback text", fallbackDefault: "Sorry, that took too long. Please try again.",
    priority: "Priority", interactive: "Interactive", standard: "Standard", batch: "Batch",
    message: "Message", messageHint: "Ask something", send: "Send", stop: "Stop",
    keys: "Enter sends, Shift+Enter breaks the line, Esc stops.",
    load: "Live load", settings: "Settings", model: "Model", system: "System prompt", systemHint: "You are a helpful assistant.",
    temperature: "Temperature", maxTokens: "Most tokens of an answer", key: "API key",
    keyNote: "Only where the server asks for one. Kept until this tab closes.",
    ready: "ready", starting: "starting", unreachable: "server cannot be reached", needsKey: "API key needed",
    readsOnly: "reads texts, but does not chat; see /docs for what it answers",
    you: "You", copy: "Copy", copied: "Copied", again: "Answer again", tryAgain: "Try again",
    answering: "Answering", answered: "The answer is complete", stopped: "Stopped", landed: "Shortened to be in time",
    cutOff: "Cut off at the most tokens", refused: "Refused before any work", tooLate: "Not complete by its deadline", failed: "No answer",
    brokeOff: "The answer broke off",
    predicted: "would need about {0}", allowed: "deadline {0}", extend: "Deadline {0}, and try again",
    queue: "Queue", tokenize: "Tokenize", prefill: "Prefill", decode: "Decode", finish: "Finish", slack: "Slack", late: "late",
    timingsOf: "Timings of the answer", firstToken: "first token {0}", inBrowser: "seen here after {0}", tokensPerSecond: "{0} tokens/s",
    tokens: "{0} tokens", prompt: "prompt {0}", cached: "{0} of it cached", steps: "{0} steps", drafted: "{0} of {1} guesses right",
    slackLeft: "{0} to spare", slackLate: "{0} late",
    cardFirst: "First token", cardTokens: "Tokens / s", cardRequests: "Requests", cardDeadlines: "Deadlines met",
    cardKv: "KV cache in use", cardPrefix: "Prefix cache hits", cardStep: "Step", cardEnd: "Whole answer",
    p99: "p99 {0}", waiting: "{0} waiting", met: "{0} met · {1} missed", turned: "{0} refused · {1} landed", running: "{0} running",
    ofPrompts: "of prompt tokens", predictedStep: "predicted {0}", preempted: "{0} preempted",
    window: "Times are of the last 30 seconds; lines, of the last minute.", noLoad: "The figures cannot be read: {0}", httpStatus: "HTTP {0}",
  },
  zh: {
    skip: "跳到输入框", pageTools: "页面", newChat: "新对话", language: "语言", panels: "负载与设置",
    theme: { auto: "主题：跟随系统", light: "主题：浅色", dark: "主题：深色" },
    conversation: "对话", messages: "消息", sideLabel: "负载与设置",
    welcome: "在时限之内，能回答什么？",
    welcomeMore: "设定时限，提出问题，看清每一毫秒花在哪里。",
    examples: ["给我三个睡个好觉的建议。", "法国的首都是哪里？", "写一段简短的话感谢同事。"],
    deadline: "时限", none: "不限", onDeadline: "来不及时", partial: "缩短回答", fallback: "发送备用文本",
    error: "报错", fallbackText: "备用文本", fallbackDefault: "抱歉，回答超时，请再试一次。",
    priority: "优先级", interactive: "交互", standard: "标准", batch: "批量",
    message: "消息", messageHint: "问点什么", send: "发送", stop: "停止",
    keys: "Enter 发送，Shift+Enter 换行，Esc 停止。",
    load: "实时负载", settings: "设置", model: "模型", system: "系统提示词", systemHint: "你是一个乐于助人的助手。",
    temperature: "温度", maxTokens: "回答的最多词元数", key: "API 密钥",
    keyNote: "仅当服务器要求时填写；关闭此标签页即清除。",
    ready: "就绪", starting: "正在启动", unreachable: "无法连接服务器", needsKey: "需要 API 密钥",
    readsOnly: "这里的模型只阅读文本，不能对话；可用接口见 /docs",
    you: "你", copy: "复制", copied: "已复制", again: "重新回答", tryAgain: "再试一次",
    answering: "正在回答", answered: "回答完毕", stopped: "已停止", landed: "为按时而缩短",
    cutOff: "已达最多词元数", refused: "未开始即被拒绝", tooLate: "未能在时限内完成", failed: "没有回答", brokeOff: "回答中断",
    predicted: "预计约需 {0}", allowed: "时限 {0}", extend: "时限改为 {0} 再试",
    queue: "排队", tokenize: "分词", prefill: "预填充", decode: "解码", finish: "收尾", slack: "余量", late: "超时",
    timingsOf: "回答的用时", firstToken: "首词元 {0}", inBrowser: "浏览器 {0} 后看到", tokensPerSecond: "{0} 词元/秒",
    tokens: "{0} 个词元", prompt: "提示 {0}", cached: "其中缓存 {0}", steps: "{0} 步", drafted: "猜对 {0}/{1}",
    slackLeft: "剩余 {0}", slackLate: "超时 {0}",
    cardFirst: "首词元", cardTokens: "词元 / 秒", cardRequests: "请求", cardDeadlines: "按时完成",
    cardKv: "KV 缓存占用", cardPrefix: "前缀缓存命中", cardStep: "单步", cardEnd: "完整回答",
    p99: "p99 {0}", waiting: "排队 {0}", met: "按时 {0} · 超时 {1}", turned: "拒绝 {0} · 缩短 {1}", running: "运行 {0}",
    ofPrompts: "占提示词元", predictedStep: "预计 {0}", preempted: "让位 {0} 次",
    window: "用时为最近 30 秒，曲线为最近一分钟。", noLoad: "无法读取指标：{0}", httpStatus: "HTTP {0}",
  },
};

let language = "en";

/** The text of a name, {0}, {1} … filled in. */
export function word(name, ...values) {
  const text = WORDS[language][name];
  return typeof text === "string" ? text.replace(/\{(\d)\}/g, (_, i) => values[i]) : text;
}

/** The language that the visitor chose, or that the browser prefers. */
export function preferredLanguage() {
  const chosen = recall("localStorage", "language");
  if (chosen in WORDS) return chosen;
  const first = navigator.languages.map((tag) => tag.slice(0, 2).toLowerCase()).find((tag) => tag in WORDS);
  return first ?? "en";
}

/** Speaks this language from now on, everywhere in the document. */
export function speak(chosen) {
  language = chosen;
  document.documentElement.lang = chosen === "zh" ? "zh-Hans" : chosen;
  for (const node of document.querySelectorAll("[data-word]")) node.textContent = word(node.dataset.word);
  for (const node of document.querySelectorAll("[data-word-label]")) node.setAttribute("aria-label", word(node.dataset.wordLabel));
  for (const node of document.querySelectorAll("[data-word-hint]")) node.placeholder = word(node.dataset.wordHint);
}

/** Milliseconds for people: 0.4 ms, 38 ms, 1.25 s. */
export function milliseconds(ms) {
  const size = Math.abs(ms);
  if (size >= 1000) return `${(ms / 1000).toFixed(size < 10000 ? 2 : 1)} s`;
  return `${ms.toFixed(size < 10 ? 1 : 0)} ms`;
}

/** The same without needless zeros: 3 s, 1.5 s. */
export const roundMilliseconds = (ms) => milliseconds(ms).replace(/\.?0+ s$/, " s").replace(".0 ms", " ms");
