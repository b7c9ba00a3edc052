package main

import "github.com/spf13/cobra"

// verbs are all commands, by group.
func (c *cli) verbs() map[string][]*cobra.Command {
	return map[string][]*cobra.Command{
		"roles":     {c.devVerb(), c.serverVerb(), c.agentVerb(), c.demoVerb()},
		"workloads": {c.runVerb(), c.enrollVerb(), c.workloadVerb(), c.identityVerb(), c.doctorVerb(), c.releaseVerb()},
		"policy": {
			c.applyVerb(), c.confirmVerb(), c.diffVerb(), c.rollbackVerb(), c.observeVerb(), c.policyVerb(), c.askVerb(), c.whyVerb(),
		},
		"domain": {
			c.getVerb(), c.statusVerb(), c.eventsVerb(), c.tokenVerb(), c.authorityVerb(), c.revokeVerb(), c.quarantineVerb(),
			c.auditVerb(), c.backupVerb(), c.restoreVerb(),
		},
	}
}
