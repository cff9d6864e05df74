//! Names of address spaces over restarts, and whose results are whose.

use shootdown_core::Incarnation;
use shootdown_proto::error::Reason;
use shootdown_proto::v1;
use shootdown_proto::v1::notifier_service_client::NotifierServiceClient;
use tonic::Status;

use super::{Vmm, refused};
use crate::common::{Agent, pages};

async fn register(vmm: &Vmm, address_space_id: u64) -> Result<u64, Status> {
    let register =
        v1::RegisterAddressSpaceRequest { name: "vmm".to_owned(), address_space_id, ..Default::default() };
    let answer = vmm.calls.clone().register_address_space(register).await?;
    Ok(answer.into_inner().address_space_id)
}

#[tokio::test]
async fn a_name_of_an_earlier_run_is_taken_back_and_its_devices_find_it() {
    let agent = Agent::start();
    let calls = NotifierServiceClient::new(agent.channel("source.sock").await);
    let vmm = Vmm { calls, space: 7 };
    assert_eq!(register(&vmm, 7).await.unwrap(), 7);
    let mut device = agent.device("gpu").await;
    device.subscribe(vmm.id(), pages(1, 1)).await;
    let round = vmm.invalidating(vmm.unmap(pages(1, 1), ""));
    let notice = device.notice().await.number;
    device.ack(notice).await;
    assert_eq!(round.await.unwrap().unwrap().seq, 2, "behind where the names of this run begin");
}

#[tokio::test]
async fn a_name_that_this_run_gave_out_or_took_back_is_not_taken_back() {
    let agent = Agent::start();
    let vmm = Vmm::start(&agent).await;
    assert_eq!(refused(register(&vmm, vmm.space).await), Reason::FieldInvalid);
    vmm.release("").await.unwrap();
    assert_eq!(refused(register(&vmm, vmm.space).await), Reason::FieldInvalid, "another had it");

    let old = Vmm { space: register(&vmm, 7).await.unwrap(), ..vmm.clone() };
    assert_eq!(refused(register(&vmm, 7).await), Reason::FieldInvalid, "it is in use");
    old.release("").await.unwrap();
    assert_eq!(refused(register(&vmm, 7).await), Reason::FieldInvalid, "its events began anew once");
}

#[tokio::test]
async fn a_name_that_was_taken_back_is_not_given_to_another() {
    let agent = Agent::start();
    let vmm = Vmm::start(&agent).await;
    let next = vmm.space + 1;
    assert_eq!(register(&vmm, next).await.unwrap(), next);
    assert_eq!(register(&vmm, next + 1).await.unwrap(), next + 1);
    assert_eq!(register(&vmm, 0).await.unwrap(), next + 2);
    assert_eq!(refused(register(&vmm, next + 2).await), Reason::FieldInvalid);
    // The top is a name like any other, and none comes after it by mistake.
    assert_eq!(register(&vmm, u64::MAX).await.unwrap(), u64::MAX);
    assert_eq!(register(&vmm, 0).await.unwrap(), next + 3);
}

#[tokio::test]
async fn names_that_are_taken_back_count_to_the_quota_and_do_not_pile_up() {
    let agent = Agent::start_with(|config| config.host.max_address_spaces = 2);
    let vmm = Vmm::start(&agent).await;
    assert_eq!(register(&vmm, 100).await.unwrap(), 100);
    assert_eq!(refused(register(&vmm, 101).await), Reason::AddressSpaceQuota);
    let mut taken = 1;
    for old in 100.. {
        match register(&vmm, old).await {
            Ok(space) => drop(Vmm { space, ..vmm.clone() }.release("").await.unwrap()),
            Err(status) if old == 100 => {
                assert_eq!(super::reason(&status), Reason::FieldInvalid);
                Vmm { space: 100, ..vmm.clone() }.release("").await.unwrap();
                continue;
            }
            Err(status) => {
                assert_eq!(super::reason(&status), Reason::AddressSpaceQuota);
                break;
            }
        }
        taken += 1;
    }
    assert_eq!(taken, 32);
    assert!(register(&vmm, 0).await.is_ok(), "new ones are not refused for that");
}

#[tokio::test]
async fn a_result_names_the_run_that_says_so() {
    let agent = Agent::start_with(|config| config.host.incarnation = Incarnation::new(77).unwrap());
    let vmm = Vmm::start(&agent).await;
    let mut device = agent.device("gpu").await;
    let subscription = device.subscribe(vmm.id(), pages(1, 1)).await;
    let blocked = v1::InvalidateRangeStartRequest { non_blockable: true, ..vmm.unmap(pages(1, 1), "") };
    let blocked = vmm.invalidate(blocked).await.unwrap();
    assert_eq!((blocked.verdict(), blocked.host_incarnation), (v1::Verdict::WouldBlock, 77));
    let late = v1::InvalidateRangeStartRequest { deadline_ms: Some(1), ..vmm.unmap(pages(1, 1), "") };
    let late = vmm.invalidate(late).await.unwrap();
    assert_eq!((late.verdict(), late.host_incarnation), (v1::Verdict::NotQuiesced, 77));
    let notice = device.notice().await.number;
    device.ack(notice).await;
    let wait = v1::AwaitRoundRequest { address_space_id: vmm.space, seq: late.seq, ..Default::default() };
    let round = vmm.calls.clone().await_round(wait).await.unwrap().into_inner().result.unwrap();
    assert_eq!((round.verdict(), round.host_incarnation), (v1::Verdict::Quiesced, 77));
    vmm.end(late.seq, "").await.unwrap();
    let round = vmm.calls.clone().await_round(wait).await.unwrap().into_inner().result.unwrap();
    assert_eq!((round.verdict(), round.host_incarnation), (v1::Verdict::Quiesced, 77));
    let unsubscribe = v1::Unsubscribe { request_id: 1, subscription_id: subscription };
    device.ask(v1::session_request::Message::Unsubscribe(unsubscribe)).await;
    device.say().await;
    assert_eq!(vmm.release("").await.unwrap().host_incarnation, 77);
}

#[tokio::test]
async fn a_registration_that_is_tried_again_makes_one_address_space() {
    let agent = Agent::start();
    let vmm = Vmm::start(&agent).await;
    let by_id = |name: &str, strict, address_space_id| v1::RegisterAddressSpaceRequest {
        name: name.to_owned(),
        strict,
        address_space_id,
        request_id: "register-1".to_owned(),
    };
    let register = async |request| {
        let answer = vmm.calls.clone().register_address_space(request).await?;
        Ok::<_, Status>(answer.into_inner().address_space_id)
    };
    let space = register(by_id("vm", true, 0)).await.unwrap();
    assert_eq!(register(by_id("vm", true, 0)).await.unwrap(), space);
    for other in [by_id("other", true, 0), by_id("vm", false, 0), by_id("vm", true, space)] {
        assert_eq!(refused(register(other).await), Reason::RequestIdReused);
    }
    let mut admin = v1::admin_service_client::AdminServiceClient::new(agent.channel("admin.sock").await);
    let listed = admin.list_address_spaces(v1::ListAddressSpacesRequest::default()).await.unwrap();
    assert_eq!(listed.into_inner().address_spaces.len(), 2, "that of the start, and one");
    // The same for one that takes a name back.
    let back =
        v1::RegisterAddressSpaceRequest { request_id: "register-2".to_owned(), ..by_id("vm", true, 77) };
    assert_eq!(register(back.clone()).await.unwrap(), 77);
    assert_eq!(register(back).await.unwrap(), 77);
    // What was refused is not remembered.
    let taken =
        v1::RegisterAddressSpaceRequest { request_id: "register-3".to_owned(), ..by_id("vm", true, 77) };
    assert_eq!(refused(register(taken.clone()).await), Reason::FieldInvalid);
    assert_eq!(refused(register(taken).await), Reason::FieldInvalid);
}

#[tokio::test]
async fn a_sequence_is_not_taken_for_that_of_another_run() {
    let agent = Agent::start_with(|config| config.host.incarnation = Incarnation::new(77).unwrap());
    let vmm = Vmm::start(&agent).await;
    let started = vmm.invalidate(vmm.unmap(pages(1, 1), "")).await.unwrap();
    let end = |host_incarnation, request_id: &str| v1::InvalidateRangeEndRequest {
        address_space_id: vmm.space,
        seq: started.seq,
        request_id: request_id.to_owned(),
        host_incarnation,
    };
    let wait = |host_incarnation| v1::AwaitRoundRequest {
        address_space_id: vmm.space,
        seq: started.seq,
        host_incarnation,
        ..Default::default()
    };
    for (host_incarnation, reason) in [(76, Reason::RoundUnknown), (78, Reason::HostSuperseded)] {
        let mut calls = vmm.calls.clone();
        assert_eq!(refused(calls.invalidate_range_end(end(host_incarnation, "")).await), reason);
        assert_eq!(refused(calls.invalidate_range_end(end(host_incarnation, "end")).await), reason);
        assert_eq!(refused(calls.await_round(wait(host_incarnation)).await), reason);
    }
    vmm.calls.clone().await_round(wait(77)).await.unwrap();
    vmm.calls.clone().invalidate_range_end(end(77, "end")).await.expect("nothing has ended it yet");
}
