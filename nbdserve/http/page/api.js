// Questions to the daemon. Everything here is a GET.

const PATIENCE = 30_000;

// An answer of the daemon that says why not; anything else that is thrown means that it is gone.
export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export async function ask(...parts) {
  const query = typeof parts.at(-1) === "object" ? `?${new URLSearchParams(parts.pop())}` : "";
  const path = parts.map(encodeURIComponent).join("/");
  const answer = await fetch(`api/${path}${query}`, {
    cache: "no-store",
    credentials: "omit",
    signal: AbortSignal.timeout(PATIENCE),
  });
  const document = await answer.json();
  if (!answer.ok) throw new Refused(answer.status, document.error ?? answer.statusText);
  return document;
}
