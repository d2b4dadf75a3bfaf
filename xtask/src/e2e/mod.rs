//! Scenarios with real processes (design 5): each makes a cluster of its own, judges it with programs
//! that we did not write, and leaves nothing behind.

mod attach;
mod backup;
mod bad_input;
mod chaos;
mod disk_faults;
mod failures;
mod full;
mod nbd;
mod old_disks;
mod partitions;
mod placement;
mod postgres;
mod processes;
mod readme;
mod real_data;
mod slow;
mod snapshots;

use crate::cluster::{self, Cluster};
use crate::packages;
use anyhow::{Result, bail};
use std::path::Path;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

/// Which scenarios.
#[derive(clap::Args)]
pub struct Arguments {
    /// Names, or parts of names; all if none is given
    names: Vec<String>,
    /// Only print the names
    #[arg(long)]
    list: bool,
    /// Keep the folders of scenarios that fail
    #[arg(long)]
    keep: bool,
}

/// A scenario: a sentence without spaces, and what to do with a fresh folder.
type Scenario = (&'static str, fn(&Cluster) -> Result<()>);

/// How long a scenario may take: many times what the longest does. One that waits for what never comes ends the run, by
/// its name.
const SCENARIO_LIMIT: Duration = Duration::from_secs(1800);

const SCENARIOS: &[Scenario] = &[
    ("up_serves_a_disk_and_down_leaves_no_process", processes::up_and_down),
    ("disks_are_created_renamed_resized_and_deleted", processes::disk_commands),
    ("a_second_up_starts_the_server_that_was_killed", processes::second_up_starts_what_is_missing),
    ("everything_killed_at_once_comes_back", processes::everything_killed_comes_back),
    ("copies_are_compared_while_nothing_runs", processes::copies_are_compared_while_nothing_runs),
    ("a_killed_supervisor_is_replaced_and_takes_its_session_over", processes::killed_supervisor_is_replaced),
    ("a_server_without_its_disk_does_not_keep_the_others_down", processes::one_server_without_its_disk),
    ("management_without_a_majority_fails_with_a_remedy", processes::no_majority),
    ("ctrl_c_stops_everything", processes::ctrl_c_stops_everything),
    ("a_moved_folder_and_a_deep_one_start", processes::moved_and_deep_folders),
    ("a_busy_nbd_port_is_said_and_the_socket_serves", processes::busy_port),
    ("two_disks_per_server_and_three_copies", processes::two_disks_three_copies),
    ("a_real_deployment_by_init_and_join", processes::init_and_join),
    ("the_readmes_deployment_on_machines_of_their_own_word_for_word", readme::deployment),
    ("two_machines_and_a_witness_go_on_without_any_one_of_them", processes::two_machines_and_a_witness),
    ("an_image_survives_kill_9_of_all_servers_under_load", real_data::image_survives_kill_9),
    ("a_file_system_lives_on_an_attached_disk", real_data::attached_file_system),
    ("a_renamed_disk_is_frozen_and_detached_by_its_new_name", attach::renamed),
    ("a_killed_attach_leaves_nothing_in_the_way_of_the_next_one", attach::killed),
    ("qemu_img_converts_in_and_out", real_data::qemu_img_converts),
    ("fio_verifies_mixed_sizes_over_two_connections", nbd::fio_verifies),
    ("illegal_nbd_requests_leave_the_server_unharmed", nbd::illegal_requests),
    ("thousands_of_idle_connections_do_no_harm", nbd::idle_connections),
    ("i_o_goes_on_when_one_server_is_killed", failures::one_server_killed),
    ("i_o_goes_on_when_the_ring_leader_is_killed", failures::ring_leader_killed),
    ("a_planned_stop_hands_over", failures::planned_stop),
    ("a_server_frozen_past_its_lease_begins_a_new_life", failures::frozen_past_its_lease),
    ("servers_that_lost_their_disks_are_made_anew_under_load", failures::lost_disks_made_anew),
    ("full_disks_refuse_what_needs_room_and_all_else_goes_on", full::refuses_and_goes_on),
    ("two_neighbours_killed_hold_up_their_common_slots_only", failures::two_neighbours_killed),
    ("a_server_is_drained_and_filled_under_writes", placement::drained_and_filled),
    ("a_disk_gets_other_copies_while_it_is_written", placement::copies_changed),
    ("a_server_that_stays_away_is_replaced_and_gets_its_share_when_it_is_back", placement::stays_away),
    ("a_server_is_added_and_its_filling_is_paused_and_turned_back", placement::added_paused_and_turned_back),
    ("moves_end_though_a_source_a_joiner_or_the_ring_leader_is_killed", placement::killed_while_moving),
    ("a_server_that_is_slow_gets_few_reads", slow::gets_few_reads),
    ("what_clients_see_while_servers_die_hang_and_are_partitioned_is_linearizable", chaos::history_is_linearizable),
    ("a_server_cut_off_from_the_others_and_not_from_clients_serves_nothing_old", partitions::cut_off_from_the_servers),
    ("i_o_goes_on_when_the_ring_leader_is_cut_off", partitions::leader_cut_off),
    ("i_o_goes_on_when_the_ring_leader_is_cut_off_from_the_servers_only", partitions::leader_cut_off_from_the_servers),
    ("a_server_that_speaks_and_does_not_hear_is_passed_by", partitions::speaks_and_does_not_hear),
    ("a_member_of_the_ring_that_hears_and_is_not_heard_is_passed_by", partitions::hears_and_is_not_heard),
    ("one_link_cut_between_two_servers_suspects_nobody", partitions::one_link_cut),
    ("a_firewall_between_the_leader_and_one_server_suspects_nobody", partitions::one_link_refused),
    ("a_client_cut_off_from_one_server_has_its_messages_passed_on", partitions::client_cut_off),
    ("a_client_refused_by_a_firewall_has_its_messages_passed_on", partitions::client_refused),
    ("postgres_lives_through_kill_9_of_two_servers_in_turn", postgres::lives_through_two_kills),
    (
        "snapshots_of_postgres_hold_what_was_acknowledged_and_nothing_later",
        postgres::snapshots_hold_what_was_acknowledged,
    ),
    ("a_snapshot_stays_as_it_was_while_its_disk_is_written_cloned_and_rolled_back", snapshots::stays_as_it_was),
    ("snapshots_are_deleted_in_any_order_and_give_back_what_was_told", snapshots::deleted_in_any_order),
    ("snapshots_are_listed_named_protected_and_refused_with_a_remedy", snapshots::commands),
    ("a_file_system_stands_still_for_a_snapshot_and_goes_on", snapshots::frozen_file_system),
    ("the_cluster_makes_snapshots_by_itself_and_none_twice", snapshots::made_by_the_cluster),
    ("ten_increments_in_another_cluster_are_the_source_bit_for_bit", backup::chain),
    ("a_backup_that_cannot_be_taken_in_is_refused_and_nothing_is_half_made", backup::refused),
    ("an_interrupted_import_or_export_stands_in_nobodys_way_for_ever", backup::interrupted),
    ("a_clone_that_is_flattened_needs_nothing_of_its_parents", backup::flattened),
    ("scrub_finds_and_repairs_what_was_written_over", disk_faults::scrub_repairs),
    ("a_disk_that_hangs_gets_out_of_the_way_and_comes_back", disk_faults::hanging_disk),
    ("blocks_that_cannot_be_read_are_served_and_repaired_from_the_other_copy", disk_faults::unreadable_blocks),
    ("a_disk_that_cannot_be_written_is_named_and_its_server_goes_down", disk_faults::disk_that_cannot_be_written),
    ("damaged_and_foreign_disks_are_refused_by_name", bad_input::damaged_disks),
    ("a_disk_restored_from_a_backup_is_refused_whoever_it_belongs_to", old_disks::restored_from_a_backup),
    (
        "a_journal_that_was_written_over_and_a_file_that_was_cut_are_refused_and_made_anew",
        old_disks::overwritten_and_cut,
    ),
    ("a_copy_of_the_disk_of_a_running_server_ends_its_process", old_disks::copied_and_started),
    ("a_disk_set_back_within_its_life_is_given_what_it_lacks", old_disks::copied_in_the_same_life),
    ("a_ring_of_one_whose_disk_was_set_back_ends_when_others_know_more", old_disks::of_who_decides_alone),
    ("a_disk_of_another_cluster_is_refused", old_disks::of_another_cluster),
    ("a_wall_clock_that_jumps_changes_nothing", old_disks::wall_clock_jumps),
    ("bad_arguments_are_refused_with_a_remedy", bad_input::bad_arguments),
];

/// Runs what was asked for.
pub fn run(arguments: Arguments) -> Result<()> {
    if arguments.list {
        SCENARIOS.iter().for_each(|(name, _)| println!("{name}"));
        return Ok(());
    }
    let wanted = |name: &str| arguments.names.is_empty() || arguments.names.iter().any(|n| name.contains(n.as_str()));
    let scenarios: Vec<&Scenario> = SCENARIOS.iter().filter(|(name, _)| wanted(name)).collect();
    if scenarios.is_empty() {
        bail!("no scenario has such a name; `cargo xtask e2e --list` shows them");
    }
    let (passed, failed) = run_these(&scenarios, arguments.keep)?;
    println!("{passed} passed, {failed} failed");
    if failed > 0 {
        bail!("scenarios failed; the reasons are above");
    }
    Ok(())
}

/// Runs all; returns how many passed and failed.
pub fn run_all() -> Result<(u64, u64)> {
    run_these(&SCENARIOS.iter().collect::<Vec<_>>(), false)
}

fn run_these(scenarios: &[&Scenario], keep: bool) -> Result<(u64, u64)> {
    packages::install_missing()?;
    let petal = cluster::build_petal()?;
    let mut counts = (0, 0);
    for (name, scenario) in scenarios {
        println!("\n== e2e {name}");
        let start = Instant::now();
        match run_one(&petal, name, *scenario, keep) {
            Ok(()) => {
                counts.0 += 1;
                println!("== e2e {name}: ok ({:.1} s)", start.elapsed().as_secs_f32());
            }
            Err(error) => {
                counts.1 += 1;
                println!("== e2e {name}: FAILED ({:.1} s)\n{error:#}", start.elapsed().as_secs_f32());
            }
        }
    }
    Ok(counts)
}

fn run_one(petal: &Path, name: &str, scenario: fn(&Cluster) -> Result<()>, keep: bool) -> Result<()> {
    let mut cluster = Cluster::new(petal, name)?;
    let (done, hung) = mpsc::channel::<()>();
    let scenario_name = name.to_string();
    std::thread::spawn(move || {
        if hung.recv_timeout(SCENARIO_LIMIT) == Err(RecvTimeoutError::Timeout) {
            println!(
                "== e2e {scenario_name}: FAILED, it hangs: not done within {SCENARIO_LIMIT:?}; nothing else is run"
            );
            std::process::exit(1);
        }
    });
    let result = scenario(&cluster);
    drop(done);
    if result.is_err() {
        show_logs(&cluster);
        if keep {
            cluster.keep();
        }
    }
    result
}

/// The ends of the logs, where a failure has its reason.
fn show_logs(cluster: &Cluster) {
    // Servers on machines of their own write beside the cluster's folder, if there is one.
    let entries = [cluster.data().as_path(), cluster.folder()].map(std::fs::read_dir);
    for entry in entries.into_iter().flatten().flatten().flatten() {
        for log in [entry.path().join("log"), entry.path()] {
            let is_log = |name: &str| {
                name == "log"
                    || name == "up.log"
                    || partitions::SERVERS.iter().any(|s| name.strip_suffix(".log") == Some(s))
            };
            if log.is_file() && log.file_name().and_then(|n| n.to_str()).is_some_and(is_log) {
                let text = std::fs::read_to_string(&log).unwrap_or_default();
                let lines: Vec<&str> = text.lines().collect();
                println!("-- {}", log.display());
                lines[lines.len().saturating_sub(15)..].iter().for_each(|l| println!("   {l}"));
            }
        }
    }
}
