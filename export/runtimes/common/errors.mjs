/** What is wrong with a folder, a picture or a setting; its message is meant for people. */
export class HostError extends Error {}
