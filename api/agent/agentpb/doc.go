// Package agentpb is the generated code of the agent API (redoubt.agent.v1); see api/agent/agent.proto.
//
// Trust: messages come from the other side of the wire; api/agent bounds and checks them.
package agentpb
