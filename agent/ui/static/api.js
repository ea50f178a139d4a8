// Asks the server. The token comes in the address's fragment, is kept for this tab, and is taken out of the address.

const KEPT = "podwall-token";

function token() {
  const given = new URLSearchParams(location.hash.slice(1)).get("token");
  if (given) {
    sessionStorage.setItem(KEPT, given);
    history.replaceState(null, "", location.pathname);
  }
  return sessionStorage.getItem(KEPT) ?? "";
}

const TOKEN = token();

export class AskError extends Error {}

async function answered(request) {
  let response;
  try {
    response = await request;
  } catch {
    throw new AskError("podwall ui does not answer: has it been ended?");
  }
  const content = await response.json();
  if (!response.ok) throw new AskError(content.error ?? `status ${response.status}`);
  return content;
}

const HEADERS = { Authorization: `Bearer ${TOKEN}` };

export const get = (path, query = {}) =>
  answered(fetch(`${path}?${new URLSearchParams(query)}`, { headers: HEADERS }));

export const post = (path, body) =>
  answered(
    fetch(path, {
      method: "POST",
      headers: { ...HEADERS, "Content-Type": "application/json" },
      body: JSON.stringify(body),
    }),
  );
