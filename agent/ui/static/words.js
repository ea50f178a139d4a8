// Numbers and times in words.

export function ago(seconds) {
  if (seconds < 3) return "now";
  for (const [unit, size] of [
    ["d", 86400],
    ["h", 3600],
    ["m", 60],
  ])
    if (seconds >= 2 * size) return `${Math.floor(seconds / size)}${unit} ago`;
  return `${Math.floor(seconds)}s ago`;
}

export const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;
