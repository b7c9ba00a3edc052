// Package client is the management API's client, which the CLI is made of, and the vocabulary that client and server
// share: what a request and an answer look like on the wire, where the rooms below have no type of their own for it.
//
// Every method is one operation of the OpenAPI document and takes a context. A refusal comes back as the
// *refusal.Error that the server returned, part by part; its cause is the whole [Problem], for those who want the
// explanation or the list of defects. What is no refusal (a broken connection, an internal failure of the server) is a
// plain error; [ErrUnreachable] marks the ones where no answer came.
//
// Trust: the server is authenticated by TLS against the CA bundle given (or by the permissions of a unix socket);
// answers are bounded in size all the same. The credential is sent in a header only, to the configured base only: the
// client follows no redirect, and no secret is ever part of a URL.
package client
